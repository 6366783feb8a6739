"""From hidden states of the short length to logits of the full one."""

import torch
from transformers.modeling_utils import slice_logits_to_keep

from ..sequence.packed_rows import take_rows


class CompressedHeadMixin:
    """For a model with `lm_head`, before upstream's class: logits and labels refer to the full length."""

    def check_labels(self, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        """Raises a `ValueError` if labels (B, L) are not as long as `tokens`, ids or embeddings (B, L, ...)."""
        if labels is not None and tokens is not None and labels.shape != tokens.shape[:2]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; they must have the full length of the input, "
                f"{tuple(tokens.shape[:2])}, with -100 where no loss is taken"
            )

    def full_length_logits(self, outputs, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """
        Logits at the requested positions of the full length; the vocabulary is computed once per distinct token.

        Args:
            outputs: Of the model without a head: `last_hidden_state` (B, M, D), and `output_index` (B, L) if M < L.
            logits_to_keep: As upstream, of the full length.

        Returns:
            (B, K, vocabulary).

        Raises:
            ValueError: If `logits_to_keep` is a boolean selection of compressed videos.
        """
        hidden_states, index = outputs.last_hidden_state, outputs.get("output_index")
        if index is None:
            return self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        is_whole = isinstance(logits_to_keep, int) and not 0 < logits_to_keep < hidden_states.shape[1]
        wanted = slice_logits_to_keep(index[..., None], logits_to_keep)[..., 0].to(hidden_states.device)
        if is_whole:
            logits = self.lm_head(hidden_states)
            return take_rows(logits, wanted.to(logits.device))
        if wanted.ndim == 1:  # a boolean selection, which is flat
            raise ValueError("a boolean logits_to_keep is not supported with compressed videos: pass positions")
        return self.lm_head(take_rows(hidden_states, wanted))
