"""Folders whose files are whole, and places that only one machine knows."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def is_local(checkpoint: str) -> bool:
    """Whether a checkpoint is named by a path, and not by its name on the Hub."""
    return os.path.isdir(checkpoint) or os.path.isabs(checkpoint) or checkpoint.startswith((".", "~"))


@contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[str]:
    """
    A folder whose files move into `folder` once all are written, `config.json` last, in place of those of the same
    name. Weights of an earlier save go when new ones come, since `from_pretrained` might prefer them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Inside, since another place may lie on another disk, from which nothing can be renamed.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as aside:
        yield aside
        new = [file.relative_to(aside) for file in Path(aside).rglob("*") if file.is_file()]
        for name in sorted(new, key=lambda name: name.name == "config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / name, folder / name)
    names = {str(name) for name in new}
    if any(map(WEIGHTS.fullmatch, names)):
        for file in folder.iterdir():
            if WEIGHTS.fullmatch(file.name) and file.name not in names:
                file.unlink()
