"""UniComp: frames that are alike are fused, unique ones get more tokens, and unique tokens stand for what is alike."""

import torch
import torch.nn.functional as F

from ..apportionment import apportion, kept_tokens
from ..host_numbers import on_device
from ..merged_video import MergedVideo
from ..spatial import masked_positions
from ..transitions import weighted_sums
from ..video_tokens import VideoTokens


# As published: the differences (1 - cosine similarity) up to which frames are fused, and below which tokens are one.
FRAME_UNIQUENESS = 0.005
TOKEN_UNIQUENESS = 0.2


def merge_unicomp(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one.

    - Fusion: a frame whose mean token differs by at most 0.005 from that of the first of a group joins it, up to
      int(1 / R) frames; a group is the mean of its frames, at the first one's place.
    - Allocation: of G groups a share of softmax(sqrt(G) * (mean of m - m)), m a group's mean similarity with all, at
      most twice the even share.
    - In a group tokens stand in line, those first whose keys are on average least like the others'. A token is
      unique if none before it in line that is unique differs by less than 0.2 from it; it becomes the mean of itself
      and the mean of all from which it differs by less. First come unique ones, then others, as they are.

    Args:
        video: Its tokens, with `keys`, which come with the importance; without, their features are compared.
        config: The settings; R is `retention_ratio`.

    Source: UniComp (arXiv 2512.03575), `unicomp/llava_arch.py` of TimeMarker-LLM/UniComp, whose
    constants these are. What differs: groups are compared by the mean of their tokens, where it has the pooling head
    of SigLIP; a group has one frame less at most, so that the budget can be met; shares are rounded to the budget's
    sum, and where unique tokens are fewer the rest is filled up, where it keeps fewer; no line break is put after a
    frame.
    """
    tokens_per_frame, device = video.tokens_per_frame, video.features.device
    num_kept = kept_tokens(video, config)
    features = video.features.detach().float()
    unit = F.normalize(features.mean(1), dim=-1)
    groups = fused_frames((unit @ unit.T).tolist(), int(1 / config.retention_ratio))
    num_groups = len(groups)
    group_of, length = on_device(
        [
            [g for g, (start, stop) in enumerate(groups) for _ in range(start, stop)],
            [stop - start for start, stop in groups for _ in range(start, stop)],
        ],
        device,
    )
    starts = on_device([start for start, _ in groups], device)

    means = features.new_zeros(num_groups, features.shape[-1]).index_add_(
        0, group_of, features.mean(1) / length[:, None]
    )
    unit = F.normalize(means, dim=-1)
    alike = (unit * unit.mean(0)).sum(-1)  # (G,), the mean similarity with all
    shares = F.softmax((alike.mean() - alike) * num_groups**0.5, dim=0)

    if video.keys is None:
        compared = torch.zeros(num_groups, *features.shape[1:], device=device)
        compared = compared.index_add_(0, group_of, features / length[:, None, None])
    else:
        compared = video.keys.detach().float()[starts]
    compared = F.normalize(compared, dim=-1)
    similarity = compared @ compared.mT  # (G, T, T)
    line = similarity.mean(-1).argsort(dim=-1, stable=True)
    is_near = (1 - similarity < TOKEN_UNIQUENESS) | torch.eye(tokens_per_frame, dtype=torch.bool, device=device)
    is_unique = unique_tokens(is_near, line)

    most = min(tokens_per_frame, max(1, num_kept // num_groups * 2))
    counts = apportion(shares, most, num_kept, tokens_per_frame, preferred=is_unique.sum(1))
    line = line.gather(1, (~is_unique).gather(1, line).int().argsort(dim=1, stable=True))  # unique ones first
    has_turn = torch.arange(tokens_per_frame, device=device) < counts[:, None]
    is_kept = torch.zeros_like(is_unique).scatter_(1, line, has_turn)
    kept = masked_positions(is_kept.view(1, -1), num_kept)[0]  # (K,) among the G * T
    group, position = kept // tokens_per_frame, kept % tokens_per_frame

    # Of each output: the weights of its group's places, then the same for every frame of the group.
    near = is_near[group, position].float()  # (K, T)
    own = F.one_hot(position, tokens_per_frame).float()
    fused = own / 2 + near / (2 * near.sum(1, keepdim=True))
    of_place = torch.where(is_unique[group, position][:, None], fused, own)
    outputs, places = of_place.nonzero(as_tuple=True)
    num_fused = on_device([stop - start for start, stop in groups], device)[group[outputs]]
    entry = torch.arange(len(outputs), device=device).repeat_interleave(num_fused)
    frame = torch.arange(len(entry), device=device) - (num_fused.cumsum(0) - num_fused)[entry]
    outputs, places = outputs[entry], places[entry]
    inputs = (starts[group[outputs]] + frame) * tokens_per_frame + places
    contributions = (inputs, outputs, of_place[outputs, places] / num_fused[entry])

    # A token is named with the output that it is most like, its own place's if there is one.
    number = torch.full((num_groups * tokens_per_frame,), -1, device=device)
    number[kept] = torch.arange(num_kept, device=device)
    number = number.view(num_groups, tokens_per_frame)
    joins = is_near & (is_kept & is_unique)[:, None]
    nearest = similarity.masked_fill(~joins, -torch.inf).argmax(-1)
    home = torch.where(joins.any(-1), number.gather(1, nearest), -1)
    assigned = torch.where(number >= 0, number, home)[group_of]
    chosen = starts[group] * tokens_per_frame + position
    return weighted_sums(video, chosen, assigned, contributions, groups, config.retention_ratio)


def fused_frames(similarity: list[list[float]], longest: int) -> list[tuple[int, int]]:
    """Half-open ranges of at most `longest` frames that are alike the first one, by their similarities (F, F)."""
    groups = []
    for frame, row in enumerate(similarity):
        if groups and 1 - row[groups[-1][0]] <= FRAME_UNIQUENESS and frame - groups[-1][0] < longest:
            groups[-1] = (groups[-1][0], frame + 1)
        else:
            groups.append((frame, frame + 1))
    return groups


@torch.no_grad()
def unique_tokens(is_near: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """(G, T, T) bool, (G, T) the order in which they come -> (G, T) bool, not near to any before that is unique."""
    each = torch.arange(len(is_near), device=is_near.device)
    is_unique, is_covered = (torch.zeros(line.shape, dtype=torch.bool, device=line.device) for _ in range(2))
    for turn in line.T:
        is_new = ~is_covered[each, turn]
        is_unique.index_put_((each, turn), is_new)
        is_covered |= is_near[each, turn] & is_new[:, None]
    return is_unique


def unicomp_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_unicomp`] where no frames are fused: frames, and the tokens of each with each other."""
    num_frames, tokens, dim = video.features.shape
    of_keys = dim if video.keys is None else video.keys.shape[-1]
    return 2.0 * num_frames * (num_frames * dim + tokens**2 * of_keys)
