"""Whether importance can be asked of a tower: one that attends within windows does not tell it."""

from torch import nn


def check_sees_frame(tower: nn.Module) -> None:
    """Raises a `ValueError` if a tower's last block, which importance is asked of, attends within windows alone."""
    last, whole = len(tower.blocks) - 1, getattr(tower, "fullatt_block_indexes", None)
    if whole is not None and last not in whole:
        raise ValueError(
            f"the vision tower's last block ({last}) attends within windows (fullatt_block_indexes: {list(whole)}), "
            "so that it does not tell what matters in a frame: choose a method that needs no importance"
        )
