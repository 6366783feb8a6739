"""Outputs of the Qwen-VL families, with what was done to the videos."""

from dataclasses import dataclass

import torch
from transformers import modeling_outputs

from ..outputs import CompressedOutput


# What models without output classes of their own return: with fields of media since transformers 5.24.
ModelOutputWithPast, CausalLMOutputWithPast = (
    getattr(modeling_outputs, f"Multimodal{name}", getattr(modeling_outputs, name))
    for name in ("BaseModelOutputWithPast", "CausalLMOutputWithPast")
)


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
