"""Functions of the installed package that a checkpoint's code does without."""

import importlib
from collections.abc import Callable


def of_package(module: str, name: str, why: str = "is there to compare with") -> Callable:
    """
    A function that is looked up when it is called, so that checkpoints do not carry its file.

    Args:
        module: Its place in `holitom_hf`.
        name: Of the function.
        why: What the file is or does.
    """

    def call(*args, **kwargs):
        try:
            found = importlib.import_module(f"holitom_hf.{module}")
        except ModuleNotFoundError as error:
            raise ImportError(f"{module!r} {why}, not carried: pip install holitom-hf") from error
        return getattr(found, name)(*args, **kwargs)

    return call
