"""Models and processors from checkpoints as LLaVA's authors published them."""

from transformers import PreTrainedModel

from ...checkpoints.checkpoint import config_values
from .files import naming_the_damage
from .names import HEAD, KEY_MAPPING, check_names, is_left_out, missing_tower
from .processing import original_processor
from .tower import fill_tower


def load_original(load, checkpoint: str, *args, **kwargs):
    """
    A model or a processor of ours from an original checkpoint.

    Args:
        load: Upstream's `from_pretrained`, bound to the class.
        checkpoint: Folder or Hub repository.
        args, kwargs: As in `from_pretrained`.

    Raises:
        OSError, ValueError: If it is incomplete, damaged or not supported.
    """
    if issubclass(load.__self__, PreTrainedModel):
        return _load_model(load, checkpoint, *args, **kwargs)
    return original_processor(load.__self__, checkpoint, **kwargs)


def _load_model(load, checkpoint: str, *args, output_loading_info: bool = False, **kwargs):
    """
    Weights are renamed while they are read. What is missing is an error and never random, but for the whole tower,
    which is then read from where the authors' code takes it.
    """
    kwargs |= {"key_mapping": KEY_MAPPING, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with naming_the_damage():
        model, report = load(checkpoint, *args, **kwargs)
    missing = {_with_head(name) for name in (*report["missing_keys"], *(n for n, *_ in report["mismatched_keys"]))}
    unexpected = {_with_head(name) for name in report["unexpected_keys"]}
    unexpected = {name for name in unexpected if not is_left_out(name, model.config.vision_config)}
    if model.get_output_embeddings() is None:
        unexpected.discard(HEAD)
    vision_tower = config_values(checkpoint, kwargs).get("mm_vision_tower")
    tower = missing_tower(model, missing) if vision_tower else set()
    check_names(checkpoint, missing - tower, unexpected)
    if tower:
        fill_tower(model, checkpoint, vision_tower, **kwargs)
    model.save_options = {"save_original_format": False}  # under the names of our modules, not of these files
    report |= {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, report) if output_loading_info else model


def _with_head(name: str) -> str:
    """What a weight is called in a model with a language-modelling head."""
    return name if name == HEAD or name.startswith("model.") else f"model.{name}"
