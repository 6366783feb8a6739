"""The safetensors files of a checkpoint, and what is in them, without reading a tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ...checkpoints.checkpoint import HUB_KWARGS


BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file.

    Attributes:
        file: Where it is.
        name: What the file calls it.
        shape: Its shape.
        num_bytes: Its size.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    num_bytes: int

    def read(self) -> torch.Tensor:
        """The tensor itself."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def weight_files(checkpoint: str, **kwargs) -> list[str]:
    """
    The safetensors files of a checkpoint, one or as its index lists them.

    Args:
        checkpoint: Folder or Hub repository.
        kwargs: Of `from_pretrained`: where and how to download.

    Raises:
        OSError: If one is not there.
    """
    hub = {name: kwargs[name] for name in (*HUB_KWARGS, "revision", "subfolder") if name in kwargs}
    try:
        return [cached_file(checkpoint, SAFE_WEIGHTS_NAME, **hub)]
    except OSError:
        try:
            index = cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, **hub)
        except OSError as error:
            raise OSError(
                f"{checkpoint} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: {error}"
            ) from error
        return get_checkpoint_shard_files(checkpoint, index, **hub)[0]


def stored_tensors(files: list[str], rename: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """
    The tensors of files, by the names that `rename` gives them; `None` leaves one out.

    Raises:
        OSError: If a file is cut off or damaged.
    """
    found = {}
    for path in files:
        with naming_the_damage(), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file, which is no dictionary
                ours = rename(name)
                if ours is not None:
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[ours] = StoredTensor(path, name, shape, prod(shape) * BYTES.get(part.get_dtype(), 1))
    return found


@contextmanager
def naming_the_damage() -> Iterator[None]:
    """Says of a file that safetensors can't read what to do about it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"a .safetensors file is cut off or damaged ({error}): download or copy it again") from error
