"""Numbers between host and device, which are waited for as seldom as can be."""

from collections.abc import Generator
from typing import Any

import torch


# A computation that yields a tensor of the device where it needs its numbers, and gets it on the host.
Steps = Generator[torch.Tensor, torch.Tensor, Any]


def on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """
    A small tensor of int64 from a (nested) list that the host knows, without waiting for the device.

    `torch.tensor(numbers, device=...)` waits until the device has done all it was given; here the copy is queued.
    """
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors on the host, which waits once for all. They are of one device and type."""
    if len(tensors) < 2:
        return [tensor.cpu() for tensor in tensors]
    joined = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def in_lockstep(computations: list[Steps]) -> list:
    """
    Runs computations side by side. The host waits once a round, however many there are.

    Args:
        computations: In a round each runs up to the next tensor that it yields, or to its end.

    Returns:
        What each of them returns.
    """
    results, answers = {}, dict.fromkeys(computations)
    while answers:
        asked = {}
        for steps, answer in answers.items():
            try:
                asked[steps] = steps.send(answer)
            except StopIteration as end:
                results[steps] = end.value
        answers = dict(zip(asked, on_host([*asked.values()])))
    return [results[steps] for steps in computations]
