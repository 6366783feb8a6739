"""Outputs of the Qwen-VL families, with what was done to the videos."""

from dataclasses import dataclass

import torch

from ..outputs import CompressedOutput
from ..upstream import CausalLMOutputWithPast, ModelOutputWithPast


@dataclass
class QwenModelOutput(CompressedOutput, ModelOutputWithPast):
    """
    Upstream's output at the short length, with the fields of [`CompressedOutput`].

    Attributes:
        output_index: (B, L) int64, for each position of the input: the entry of `last_hidden_state` that holds the
            last token at or before it that survived; `None` if all did.
    """

    output_index: torch.Tensor | None = None


@dataclass
class QwenCausalLMOutput(CompressedOutput, CausalLMOutputWithPast):
    """Upstream's output at the full length, with the fields of [`CompressedOutput`]."""
