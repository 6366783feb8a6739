"""What transformers is told of as soon as the part of it that asks is there, and not before."""

import importlib
import importlib.abc
import importlib.util
import sys

from ..checkpoints.backbone import PIPELINE_TASK
from .registry import FOLDERS


PIPELINES = "transformers.pipelines"
# Which import each other, so that the task can be registered behind the outermost import alone.
WATCHED = {PIPELINES, *(f"{__package__}.{name}" for name in ("pipeline", *(f"{f}.modeling" for f in FOLDERS)))}
AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_when_transformers_is_imported() -> None:
    """
    Registers the task "video-text-to-text" for pipelines, and the configurations of LLaVA's authors for Auto classes,
    now or when what asks for them is imported. Imports nothing by itself.
    """
    for needed, watched, register in (
        (PIPELINES, WATCHED, register_task),
        (AUTO_CONFIG, {AUTO_CONFIG}, register_originals),
    ):
        if needed in sys.modules:
            register()
        elif not any(isinstance(finder, _Registering) and finder.needed == needed for finder in sys.meta_path):
            sys.meta_path.insert(0, _Registering(needed, watched, register))


def register_originals() -> None:
    """Makes AutoConfig, and what asks it, take a `config.json` of type "llava_qwen"."""
    importlib.import_module(".original.registration", __package__)


def register_task() -> None:
    """Makes `pipeline("video-text-to-text", ...)` work, with the model of ours that fits a plain checkpoint, too."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from .pipeline import VideoTextToTextPipeline
    from .registry import backbone_class, backbones

    classes = tuple(backbone_class(backbone, "generation") for backbone in backbones().values())
    PIPELINE_REGISTRY.register_pipeline(
        PIPELINE_TASK, pipeline_class=VideoTextToTextPipeline, pt_model=classes, type="multimodal"
    )


class _Registering(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Looks on while the watched modules are imported, and registers when the outermost of them is there."""

    def __init__(self, needed, watched, register):
        self.needed, self.watched, self.register = needed, watched, register
        self.loaders, self.depth, self.is_looking = {}, 0, False

    def find_spec(self, fullname, path=None, target=None):
        """Overrides MetaPathFinder.find_spec: the spec that others find, with this object as its loader."""
        if fullname not in self.watched or self.is_looking:
            return None
        self.is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_looking = False
        if spec is not None:
            self.loaders[fullname] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec):
        """Overrides Loader.create_module."""
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        """Overrides Loader.exec_module."""
        loader = self.loaders[module.__name__]
        module.__spec__.loader = module.__loader__ = loader
        self.depth += 1
        try:
            loader.exec_module(module)
        finally:
            self.depth -= 1
        if self.depth == 0 and self.needed in sys.modules:
            sys.meta_path.remove(self)
            self.register()
