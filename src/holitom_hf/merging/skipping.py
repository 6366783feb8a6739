"""Which layers visual tokens leave work out in: checks of the setting."""

from typing import Any


def check_skipped(owner: str, name: str, value: Any, num_hidden_layers: int | None = None) -> None:
    """
    Raises a `TypeError` or `ValueError` unless `value` is a list of layers, none of them twice.

    Args:
        owner, name: Of the field.
        value: Its value.
        num_hidden_layers: Of the decoder; `None`: not known yet.
    """
    allowed = "a list of different layers, integers >= 0, or None"
    if not isinstance(value, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in value):
        raise TypeError(f"{owner}.{name} must be {allowed}, got {value!r}")
    if min(value, default=0) < 0 or len(set(value)) < len(value):
        raise ValueError(f"{owner}.{name} must be {allowed}, got {value!r}")
    if num_hidden_layers is not None and max(value, default=0) >= num_hidden_layers:
        raise ValueError(
            f"{owner}.{name} is {value!r}, but the decoder has {num_hidden_layers} layers: choose from 0 to "
            f"{num_hidden_layers - 1}"
        )
