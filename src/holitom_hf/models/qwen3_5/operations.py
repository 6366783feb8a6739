"""Operations of Qwen3.5 before its decoder."""

from ..qwen_vl.operations import encoder_operations


__all__ = ["encoder_operations"]
