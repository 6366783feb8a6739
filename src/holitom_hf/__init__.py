"""HoliTom, holistic token merging for video LLMs (NeurIPS 2025), as a native part of transformers."""

import importlib

from .models.pipeline_task import register_when_transformers_is_imported
from .models.registry import public_names


__version__ = "0.2.0"

# Where the public names are. Nothing of torch or transformers is imported before one of them is asked for (PEP 562).
_MODULE_OF = {
    "HoliTomConfig": "configuration",
    "HoliTomQwen2Model": "models.llava_onevision.modeling",
    "VideoTextToTextPipeline": "models.pipeline",
} | public_names()

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_transformers_is_imported()
