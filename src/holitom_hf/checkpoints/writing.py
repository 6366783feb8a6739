"""Folders whose files are whole, and places that only one machine knows."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

# What loading starts with, the model's last. Taken away would not do: upstream takes its defaults, then.
ENTRIES = ("video_preprocessor_config.json", "processor_config.json", "config.json")
BROKEN_OFF = "A save into this folder was broken off: save again.\n"


def is_local(checkpoint: str) -> bool:
    """Whether a checkpoint is named by a path, and not by its name on the Hub."""
    return os.path.isdir(checkpoint) or os.path.isabs(checkpoint) or checkpoint.startswith((".", "~"))


@contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[str]:
    """
    A folder whose files move into `folder` once all are written, in place of those of the same name. Weights of an
    earlier save go when new ones come, since `from_pretrained` might prefer them.

    Until all are moved, the files that loading starts with hold a sentence in place of JSON: what is broken off then
    is refused, and never a mixture of two saves, until all that it holds is saved again. Files that did not get there
    stay in its `.saving.*`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Inside, since another place may lie on another disk, from which nothing can be renamed.
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving."))
    try:
        yield str(aside)
    except BaseException:
        shutil.rmtree(aside)
        raise
    names = {str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file()}
    if "config.json" not in names and any(_is_other_code(aside / name, folder / name) for name in names):
        # The model runs that code, too.
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(folder / "config.json", aside / "config.json")
            names.add("config.json")
    entries = [name for name in ENTRIES if name in names]
    for name in reversed(entries):
        (aside / ".broken").write_text(BROKEN_OFF)
        os.replace(aside / ".broken", folder / name)
    weights = set(filter(WEIGHTS.fullmatch, names))
    for file in list(folder.iterdir()) if weights else ():
        if WEIGHTS.fullmatch(file.name) and file.name not in weights:
            file.unlink()
    for name in [*sorted(names - set(entries)), *entries]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / name, folder / name)
    shutil.rmtree(aside)


def _is_other_code(new: Path, old: Path) -> bool:
    return new.suffix == ".py" and old.is_file() and new.read_bytes() != old.read_bytes()
