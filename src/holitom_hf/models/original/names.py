"""What LLaVA's authors call a weight, and what our modules call it."""

import re

from transformers import PreTrainedModel


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
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def renamed(name: str) -> str:
    """The name of a weight in our modules."""
    for pattern, ours in KEY_MAPPING.items():
        name, count = re.subn(pattern, ours, name)
        if count:
            break
    return name


def is_left_out(name: str, vision_config) -> bool:
    """
    Whether nothing asks a weight: the tower's last layer and its head, and what old transformers wrote of rotary
    embeddings.

    Args:
        name: In our modules.
        vision_config: Of the tower, without its last layer.
    """
    layer = re.match(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.", name)
    is_last = layer is not None and int(layer[1]) >= vision_config.num_hidden_layers
    return is_last or name.startswith(TOWER + "head.") or name.endswith(".rotary_emb.inv_freq")


def check_names(checkpoint: str, missing: set[str], unexpected: set[str]) -> None:
    """
    Raises an `OSError` with the first names if weights are missing (or of another shape), or have no place.

    Args:
        checkpoint: Whose they are.
        missing, unexpected: In our modules.
    """
    for names, what in ((missing, "are missing or of another shape"), (unexpected, "have no place in the model")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise OSError(f"weights of {checkpoint} {what}: {', '.join(sorted(names)[:3])}{more}")


def missing_tower(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """The weights of a model's vision tower, as they are called with a head, if all of them are missing."""
    names = {TOWER + name for name in model.base_model.vision_tower.state_dict()}
    return names if names <= missing else set()
