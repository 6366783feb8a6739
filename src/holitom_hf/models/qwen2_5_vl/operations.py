"""Operations of Qwen2.5-VL before its decoder."""

from ..qwen_vl.operations import encoder_operations


__all__ = ["encoder_operations"]
