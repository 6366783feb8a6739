"""The weights of checkpoints that LLaVA's authors published."""

import re

from safetensors import SafetensorError
from transformers import PreTrainedModel, SiglipVisionModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

# From the names in the files to those of our modules; transformers applies them while it loads, tensor by tensor.
KEY_MAPPING = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.norm\.": "model.language_model.norm.",
}
TOWER = "model.vision_tower."


def load_original(
    model_class: type[PreTrainedModel], checkpoint: str, config, vision_tower: str | None, **kwargs
) -> PreTrainedModel:
    """
    A model of ours with the weights of an original checkpoint.

    Args:
        model_class: With a language-modelling head.
        checkpoint: Folder or Hub repository.
        config: Ours, from [`converted_config`].
        vision_tower: Where a checkpoint without the tower's weights takes them from, which is said aloud.
        kwargs: As in `from_pretrained`.

    Raises:
        OSError: If weights are missing, too many or of another shape, or a file is cut off or damaged.
    """
    try:
        model, report = model_class.from_pretrained(
            checkpoint,
            config=config,
            key_mapping=KEY_MAPPING,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    except SafetensorError as error:
        raise OSError(f"a .safetensors file is cut off or damaged ({error}): download or copy it again") from error
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    in_tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if in_tower and in_tower <= missing and vision_tower:
        logger.warning(f"{checkpoint} has no weights of its vision tower: they are taken from {vision_tower}.")
        missing -= in_tower
        _load_tower(model, vision_tower)
    unexpected = {name for name in report["unexpected_keys"] if not _is_left_out(name, config.vision_config)}
    for names, what in ((missing, "are missing or of another shape"), (unexpected, "have no place in the model")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OSError(f"weights of {checkpoint} {what}: {', '.join(sorted(names)[:3])}{more}")
    return model


def _load_tower(model: PreTrainedModel, vision_tower: str) -> None:
    """Fills a model's vision tower from a SigLIP of its own."""
    tower, report = SiglipVisionModel.from_pretrained(
        vision_tower,
        config=model.config.vision_config,
        dtype=model.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if missing:
        raise OSError(f"weights of {vision_tower} are missing or of another shape: {', '.join(sorted(missing)[:3])}")
    model.model.vision_tower.load_state_dict(tower.state_dict())


def _is_left_out(name: str, vision_config) -> bool:
    """Whether a weight is of the tower's last layer or its head, which nothing asks."""
    layer = re.match(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.", name)
    return name.startswith(TOWER + "head.") or (layer is not None and int(layer[1]) >= vision_config.num_hidden_layers)
