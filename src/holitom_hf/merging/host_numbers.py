"""Numbers that the host knows, on the device, without waiting for it."""

import torch


def on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """
    A small tensor of int64 from a (nested) list.

    `torch.tensor(numbers, device=...)` waits until the device has done all it was given; here the copy is queued.
    """
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
