"""What the compressed model returns beside upstream's outputs."""

from dataclasses import dataclass

import torch
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
    LlavaOnevisionModelOutputWithPast,
)

from .merged_video import MergedVideo


@dataclass
class HoliTomModelOutputWithPast(LlavaOnevisionModelOutputWithPast):
    """
    `LlavaOnevisionModelOutputWithPast` at the short length, with what was done.

    `last_hidden_state` and the entries of `hidden_states` and `attentions` are as long as the sequence is inside:
    N positions before stage 3, M after it.

    Attributes:
        merged_videos: A list per row with a [`MergedVideo`] per video of this call; `None` if nothing was merged.
        inner_keep: A list with, per row, the (n,) int64 indices of the tokens that survived stage 3 among those that
            entered the decoder (without padding), ascending; `None` where it did not run.
        output_index: (B, L) int64, for each position of the input: the entry of `last_hidden_state` that holds the
            last token at or before it that survived; `None` if all did.
    """

    merged_videos: list[list[MergedVideo]] | None = None
    inner_keep: list[torch.Tensor | None] | None = None
    output_index: torch.Tensor | None = None


@dataclass
class HoliTomCausalLMOutputWithPast(LlavaOnevisionCausalLMOutputWithPast):
    """
    `LlavaOnevisionCausalLMOutputWithPast` whose `logits` have the full length of the input: at a position whose token
    was dropped stand the logits of the last surviving token before it.

    Attributes:
        merged_videos: As in [`HoliTomModelOutputWithPast`].
        inner_keep: As in [`HoliTomModelOutputWithPast`].
    """

    merged_videos: list[list[MergedVideo]] | None = None
    inner_keep: list[torch.Tensor | None] | None = None
