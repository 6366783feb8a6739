"""The code that a checkpoint carries, so that it runs where holitom-hf is not installed."""

import importlib
import os
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .backbone import ENTRIES, Backbone


def save_remote_code(save_directory: str | os.PathLike, backbone: Backbone) -> None:
    """
    Writes the files that a checkpoint of `backbone` needs into `save_directory`.

    Raises:
        ImportError: If they could not import each other.
    """
    for name, source in carried_modules(backbone).items():
        (Path(save_directory) / f"{name}.py").write_text(source, encoding="utf-8")


def carried_modules(backbone: Backbone) -> dict[str, str]:
    """The modules that a checkpoint of `backbone` carries, and their sources."""
    here = Path(__file__)
    if here.name == "remote_code.py":
        # Not by an import statement, which would make it part of the code that is carried.
        return importlib.import_module(".flattening", __package__).flat_package(backbone)
    # As remote code this module lies beside the others, which are flat already. Of those only the ones imported so far
    # are there: importing the model does not bring the processor's. They are then left to the class that does.
    entries = [here.with_name(f"{name}.py") for name in ENTRIES]
    files = {Path(f) for e in entries if e.is_file() for f in (e, *get_relative_import_files(e))}
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(files)}
