"""The weights of a SigLIP, for checkpoints that leave them to its own repository."""

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...checkpoints.checkpoint import HUB_KWARGS
from .files import StoredTensor, stored_tensors, weight_files
from .names import TOWER, check_names


logger = logging.get_logger(__name__)


def tower_tensors(checkpoint: str, vision_tower: str, expected: dict[str, torch.Size], **kwargs):
    """
    Where the weights of a vision tower are, which is said aloud.

    Args:
        checkpoint: Which has none of its own.
        vision_tower: Folder or Hub repository of a SigLIP.
        expected: Shapes of the weights by their names in our modules.
        kwargs: Of `from_pretrained`: how to download.

    Returns:
        [`StoredTensor`] by name.

    Raises:
        OSError: If it has not all of them, or they are of another shape.
    """
    logger.warning(f"{checkpoint} has no weights of its vision tower: they are taken from {vision_tower}.")

    def ours(name: str) -> str | None:
        name = TOWER + name.removeprefix("vision_model.")
        return name if name in expected else None

    files = weight_files(vision_tower, **{name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
    found = stored_tensors(files, ours)
    check_names(vision_tower, {name for name in expected if not _fits(found.get(name), expected[name])}, set())
    return found


@torch.no_grad()
def fill_tower(model: PreTrainedModel, checkpoint: str, vision_tower: str, **kwargs) -> None:
    """
    Reads a model's vision tower from a SigLIP of its own, a tensor at a time.

    Raises:
        OSError: As [`tower_tensors`].
        ValueError: If parts of the tower are not in memory, or are quantized.
    """
    parameters = {TOWER + name: parameter for name, parameter in model.base_model.vision_tower.state_dict().items()}
    if any(parameter.is_meta or not parameter.is_floating_point() for parameter in parameters.values()):
        raise ValueError(
            f"{checkpoint} has no weights of its vision tower, and one that is offloaded or quantized can't be taken "
            f"from {vision_tower}: write a checkpoint that has it with `holitom-hf convert {checkpoint} FOLDER` first"
        )
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for name, tensor in tower_tensors(checkpoint, vision_tower, shapes, **kwargs).items():
        parameters[name].copy_(tensor.read())


def _fits(tensor: StoredTensor | None, shape: torch.Size) -> bool:
    return tensor is not None and tensor.shape == tuple(shape)
