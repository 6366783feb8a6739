"""How a checkpoint stores the experts of Qwen3-VL-MoE. Without vLLM."""

import torch


def published_experts(name: str, weight: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    A weight as published checkpoints, and vLLM, have it: of all experts together (E, in, out). transformers 5 saves
    (E, out, in). Square ones can't be told apart, and stay.

    Args:
        name: Of any weight.
        weight: Its value.
        hidden_size: D: `gate_up_proj` takes it in and `down_proj` puts it out.
    """
    axis = {"gate_up_proj": 1, "down_proj": 2}.get(name.rpartition(".experts.")[2])
    return weight if axis is None or weight.shape[axis] == hidden_size else weight.transpose(1, 2)
