"""The task "video-text-to-text", known to transformers' pipelines as soon as these are there, and not before."""

import importlib.abc
import importlib.util
import sys

from ..checkpoints.backbone import PIPELINE_TASK
from .registry import FOLDERS


PIPELINES = "transformers.pipelines"
# Which import each other, so that the task can be registered behind the outermost import alone.
WATCHED = {PIPELINES, *(f"{__package__}.{name}" for name in ("pipeline", *(f"{f}.modeling" for f in FOLDERS)))}


def register_when_pipelines_are_imported() -> None:
    """Registers the task, now if transformers' pipelines are imported already. Imports nothing by itself."""
    if PIPELINES in sys.modules:
        register_task()
    elif not any(isinstance(finder, _Registering) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registering())


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
    """Looks on while the watched modules are imported, and registers the task when the outermost of them is there."""

    def __init__(self):
        self.loaders, self.depth, self.is_looking = {}, 0, False

    def find_spec(self, fullname, path=None, target=None):
        """Overrides MetaPathFinder.find_spec: the spec that others find, with this object as its loader."""
        if fullname not in WATCHED or self.is_looking:
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
        if self.depth == 0 and PIPELINES in sys.modules:
            sys.meta_path.remove(self)
            register_task()
