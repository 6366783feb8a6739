"""Upstream's outputs of LLaVA-OneVision, with what was done to the videos."""

from dataclasses import dataclass

import torch
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
    LlavaOnevisionModelOutputWithPast,
)

from ..outputs import CompressedOutput


@dataclass
class HoliTomModelOutputWithPast(CompressedOutput, LlavaOnevisionModelOutputWithPast):
    """
    `LlavaOnevisionModelOutputWithPast` at the short length, with the fields of [`CompressedOutput`].

    Attributes:
        output_index: (B, L) int64, for each position of the input: the entry of `last_hidden_state` that holds the
            last token at or before it that survived; `None` if all did.
    """

    output_index: torch.Tensor | None = None


@dataclass
class HoliTomCausalLMOutputWithPast(CompressedOutput, LlavaOnevisionCausalLMOutputWithPast):
    """`LlavaOnevisionCausalLMOutputWithPast` at the full length, with the fields of [`CompressedOutput`]."""
