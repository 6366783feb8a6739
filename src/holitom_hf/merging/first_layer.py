"""From which layer on a vision tower may merge."""


def check_first_layer(layer: int, last: int) -> None:
    """Raises a `ValueError` unless a tower that merges from there on can have merged before importance is taken."""
    if layer > last:
        raise ValueError(
            f"vision_reuse_layer is {layer}, but what is merged must be so before importance is taken: choose 1 to "
            f"{last}, or None to compute all patches"
        )
