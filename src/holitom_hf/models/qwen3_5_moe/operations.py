"""Operations of Qwen3.5-MoE before its decoder."""

from ..qwen_vl.operations import encoder_operations


__all__ = ["encoder_operations"]
