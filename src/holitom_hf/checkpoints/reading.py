"""Weights that are whole, or refused."""

from safetensors import SafetensorError
from transformers import PreTrainedModel


def load_whole(model_class: type[PreTrainedModel], checkpoint: str, **kwargs) -> PreTrainedModel:
    """
    `model_class.from_pretrained(checkpoint, **kwargs)` that refuses what upstream fills with random weights.

    Raises:
        OSError: If weights are missing or of another shape, or their file is cut off or damaged.
    """
    try:
        model, report = model_class.from_pretrained(
            checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise OSError(f"a .safetensors file is cut off or damaged ({error}): download or copy it again") from error
    names = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise OSError(f"weights are missing or of another shape, and would be random: {', '.join(names[:3])}{more}")
    return model
