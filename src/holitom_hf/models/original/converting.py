"""From the files of LLaVA's authors to files of our modules' names, without a model in memory."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ...checkpoints.checkpoint import config_values
from .files import StoredTensor, stored_tensors, weight_files
from .names import EMBEDDING, HEAD, check_names, is_left_out, missing_tower, renamed
from .tower import tower_tensors


MAX_SHARD_SIZE = 5 * 10**9  # bytes; as large as the authors' own


def convert_weights(
    model: PreTrainedModel, checkpoint: str, folder: Path, max_shard_size: int | None = None, **hub
) -> None:
    """
    Writes weights, configuration, code and generation settings. The weights keep their dtype and are in memory file by
    file, each of at most `max_shard_size` bytes, or one tensor.

    Args:
        model: With the shapes of its weights, on the "meta" device.
        checkpoint: Original, a folder or Hub repository.
        folder: Where to write.
        max_shard_size: Of a file, in bytes; `None`: `MAX_SHARD_SIZE`.
        hub: Where and how to download.

    Raises:
        OSError: If weights are missing, too many or of another shape, or a file is cut off or damaged. No weights are
            written then.
    """
    found = stored_tensors(weight_files(checkpoint, **hub), renamed)
    tensors = _checked(model, checkpoint, found, hub)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size or MAX_SHARD_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].read() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _checked(
    model: PreTrainedModel, checkpoint: str, found: dict[str, StoredTensor], hub: dict
) -> dict[str, StoredTensor]:
    """The weights that are to be written, in the model's order."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected[HEAD]
        _check_tied(checkpoint, found)
    missing = {name for name, shape in expected.items() if name not in found or found[name].shape != tuple(shape)}
    vision_tower = config_values(checkpoint, hub).get("mm_vision_tower")
    tower = missing_tower(model, missing) if vision_tower else set()
    unexpected = {name for name in set(found) - set(expected) if not is_left_out(name, model.config.vision_config)}
    check_names(checkpoint, missing - tower, unexpected)
    if tower:
        found |= tower_tensors(checkpoint, vision_tower, {name: expected[name] for name in tower}, **hub)
    return {name: found[name] for name in expected}


def _check_tied(checkpoint: str, found: dict[str, StoredTensor]) -> None:
    """Takes out a head that is the embedding once more."""
    head = found.pop(HEAD, None)
    if head is not None and EMBEDDING in found and not torch.equal(head.read(), found[EMBEDDING].read()):
        raise OSError(
            f"{checkpoint} has tie_word_embeddings=True, and another {HEAD} than {EMBEDDING}: set it to false in "
            "config.json, or take the head out"
        )
