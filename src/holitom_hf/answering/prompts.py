"""What a processor made of prompts, on its way to the model, whichever backbone it is for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import BatchFeature


# What a vision tower takes of a prompt's videos; a model with flat patches has their grids beside them.
PIXELS, GRIDS = "pixel_values_videos", "video_grid_thw"
# Of every token of a prompt, padded with zeros.
PER_TOKEN = ("mm_token_type_ids",)
TEXT = ("input_ids", "attention_mask")


@dataclass
class ExpandedVideo:
    """
    What a processor wrote into a prompt for its one video, to be written into others.

    Attributes:
        ids: (N,), placeholders and the text between and behind them.
        features: What the processor made beside text and pixels.
        num_joined: Tokens of the text behind the video that its last one holds, too: a full stop and the end of its
            line are one token of Qwen's.
    """

    ids: torch.Tensor
    features: dict
    num_joined: int = 0

    @classmethod
    def of(cls, features: BatchFeature, text: str, processor) -> "ExpandedVideo":
        """
        Takes it out of a prompt.

        Args:
            features: What the processor made of the prompt.
            text: The prompt, with one placeholder.
            processor: Which one.
        """
        around, place = _tokens_around(text, processor)
        ids = features["input_ids"][0].cpu()
        most = len(around) - place - 1
        is_same = ids[len(ids) - most :] == around[place + 1 :]
        num_same = int(is_same.flip(0).long().cumprod(0).sum())
        others = {name: value for name, value in features.items() if name not in (*PER_TOKEN, *TEXT, PIXELS)}
        return cls(ids[place : len(ids) - num_same], others, most - num_same)

    def prompt(self, text: str, processor) -> BatchFeature:
        """
        Another prompt about the video, as the processor would make it, but for the pixels.

        Args:
            text: With one placeholder, and the same around it up to the next token.
            processor: The same.
        """
        around, place = _tokens_around(text, processor)
        ids = torch.cat([around[:place], self.ids, around[place + 1 + self.num_joined :]])[None]
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in processor.model_input_names:
            features["mm_token_type_ids"] = 2 * (ids == processor.video_token_id).int()
        return BatchFeature(features | self.features)


def _tokens_around(text: str, processor) -> tuple[torch.Tensor, int]:
    """The tokens of a prompt with one placeholder, and where that is."""
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
    [place] = (ids == processor.video_token_id).nonzero()[:, 0].tolist()
    return ids, place


def frames_of(features: BatchFeature, processor) -> list[int]:
    """
    How many frames every video has.

    Args:
        features: What the processor made of prompts with videos.
        processor: Which one.
    """
    if GRIDS in features:  # of temporal patches
        return (torch.as_tensor(features[GRIDS])[:, 0] * processor.video_processor.temporal_patch_size).tolist()
    return [len(frames) for frames in features[PIXELS]]


def encode_videos(model, features: BatchFeature, **kwargs):
    """
    The videos of prompts after the vision tower, as `generate` takes them in `mm_encoder_outputs`.

    Args:
        model: With a head.
        features: What its processor made of the prompts. Their pixels may be on the host.
        kwargs: For `get_video_features`.
    """
    grids = {GRIDS: features[GRIDS]} if GRIDS in features else {}
    return model.get_video_features(features[PIXELS], **grids, return_vision_states=False, return_dict=True, **kwargs)


def joined_prompts(rows: list[BatchFeature], tokenizer) -> BatchFeature:
    """
    Prompts that were processed one by one, as one batch that is padded on the left.

    Args:
        rows: Of one prompt each, with videos.
        tokenizer: The processor's.

    Returns:
        As the processor of the backbone returns it for several prompts; the pixels of videos that are not flat
        patches as a list.
    """
    ids = [row["input_ids"][0].tolist() for row in rows]
    features = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    length = features["input_ids"].shape[1]
    for name in rows[0].keys() - set(TEXT):
        values = [row[name] for row in rows]
        if name in PER_TOKEN:
            features[name] = torch.cat([F.pad(value, (length - value.shape[1], 0)) for value in values])
        elif (name == PIXELS and GRIDS not in rows[0]) or not isinstance(values[0], torch.Tensor):
            features[name] = [video for row in values for video in row]
        else:
            features[name] = torch.cat(values)
    return BatchFeature(dict(features))
