"""Places of a frame that find their most alike in turns, in another number in every frame (DyMU, arXiv 2504.17040)."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def best_partners(keys: torch.Tensor, is_real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Every other place of a frame is in set A and finds the one in set B that it is most like.

    Args:
        keys: (F, n, K), what is compared.
        is_real: (F, n) bool, False behind a frame's last place.

    Returns:
        The cosine similarity (F, ceil(n / 2)) float32, -inf where there is no place or nothing to be like, and which
        of B it is, (F, ceil(n / 2)) int64.

    Source: ToMe (arXiv 2210.09461), section 3, of frames with padding.
    """
    is_source, is_target = is_real[:, ::2], is_real[:, 1::2]
    if not is_target.shape[1]:
        return torch.full(is_source.shape, -torch.inf, device=keys.device), torch.zeros_like(
            is_source, dtype=torch.long
        )
    unit = F.normalize(keys.float(), dim=-1)
    scores = (unit[:, ::2] @ unit[:, 1::2].mT).clamp_max(1.0)  # rounding must not pass a threshold of 1
    best = scores.masked_fill(~is_target[:, None], -torch.inf).max(-1)
    return best.values.masked_fill(~is_source, -torch.inf), best.indices


def threshold_of(scores: torch.Tensor, num_merged: int) -> float:
    """
    The threshold that the `num_merged` highest of `scores` lie above; of those that are above 0.

    Args:
        scores: Of any shape, as in [`best_partners`].
        num_merged: With 0 the threshold is 1, which none lies above.

    Source: DyMU (arXiv 2504.17040), section 3.1.
    """
    finite = scores[scores.isfinite()]
    if num_merged == 0 or not len(finite):
        return 1.0
    highest = finite.sort(descending=True).values
    return max(0.0, float(highest[min(num_merged, len(highest) - 1)]))
