"""What compressed models return beside upstream's outputs."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from ..merging.merged_video import MergedVideo


@dataclass
class CompressedOutput:
    """
    What was done to the videos. Before upstream's output class in a backbone's bases, so that its fields come last.

    `last_hidden_state` and the entries of `hidden_states` and `attentions` are as long as the sequence is inside:
    N positions before stage 3, M after it. `logits` have the full length of the input: at a position whose token was
    dropped stand the logits of the last surviving token before it.

    Attributes:
        merged_videos: A list per row with a [`MergedVideo`] per video of this call; `None` if nothing was merged.
        inner_keep: A list with, per row, the (n,) int64 indices of the tokens that survived stage 3 among those that
            entered the decoder (without padding), ascending; `None` where it did not run.
    """

    merged_videos: list[list[MergedVideo]] | None = None
    inner_keep: list[torch.Tensor | None] | None = None


def shared_fields(outputs: ModelOutput, output_class: type[ModelOutput]) -> dict:
    """What `outputs` has of the fields of `output_class`, whatever this release of transformers calls them."""
    # Not `dataclasses.fields`, which torch.compile can't trace over a class.
    return {name: value for name, value in outputs.items() if name in output_class.__dataclass_fields__}
