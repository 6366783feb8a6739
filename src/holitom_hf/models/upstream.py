"""What differs between the releases of transformers that this package works with."""

import functools
import inspect
from collections.abc import Callable

from transformers import modeling_outputs
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg


OLD_CACHE_NAME = "past_key_values"
# What forward passes and outputs call the cache: "cache" since transformers 5.24.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else OLD_CACHE_NAME
# Whether outputs keep what the encoders returned, as `image_outputs` and `video_outputs`: since transformers 5.24.
HAS_ENCODER_OUTPUTS = hasattr(modeling_outputs, "MultimodalModelOutput")


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache that a forward pass or `generate` returned."""
    return outputs.get(CACHE_NAME)


def takes_cache(function: Callable) -> Callable:
    """
    Decorator of an override with an argument `cache`: it takes `past_key_values`, too, which is upstream's name for it
    before transformers 5.24 and deprecated since.
    """
    if CACHE_NAME != OLD_CACHE_NAME:
        return deprecate_kwarg(OLD_CACHE_NAME, "5.40.0", new_name="cache")(function)

    @functools.wraps(function)
    def renaming(*args, **kwargs):
        if OLD_CACHE_NAME in kwargs:
            kwargs["cache"] = kwargs.pop(OLD_CACHE_NAME)
        return function(*args, **kwargs)

    # `generate` reads there which arguments it may pass.
    signature = inspect.signature(function)
    names = [OLD_CACHE_NAME if name == "cache" else name for name in signature.parameters]
    renamed = [parameter.replace(name=name) for name, parameter in zip(names, signature.parameters.values())]
    renaming.__signature__ = signature.replace(parameters=renamed)
    return renaming
