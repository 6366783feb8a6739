"""Names of weights: the vision tower's in checkpoints of transformers 5.23 are shorter than in published ones."""

import re


# What transformers before 5.23 put between a tower and its layers, and vLLM still does.
TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
PUBLISHED_TOWER = r"\1vision_model."


def published_name(name: str) -> str:
    """What a published checkpoint calls a weight, from either name."""
    return TOWER.sub(PUBLISHED_TOWER, name)
