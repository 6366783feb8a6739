"""Where tokens of the Qwen-VL families stand: three axes, counted from a cache's record and never from the model."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from ...merging.merged_video import MergedVideo
from ...merging.video_tokens import VideoTokens
from ...sequence.compressed_sequence import CompressedSequence
from ...sequence.placeholders import cached_length, check_position_ids
from ..generation import HoliTomGenerationMixin
from ..upstream import CACHE_NAME


GRIDS = ("image_grid_thw", "video_grid_thw")


class QwenPositionsMixin:
    """
    For the model of a Qwen-VL backbone, before [`CompressingModelMixin`]: a token keeps the coordinates (t, h, w) and
    the placeholder of the place that it stands for, whatever `position_ids` the settings name. Text goes on behind
    the uncompressed video, whose frames take as many positions as their longer side has tokens, however few are left.
    """

    def token_slots(self, merged: MergedVideo, video: VideoTokens) -> torch.Tensor:
        """Overrides CompressingModelMixin.token_slots: each its own, so that text between frames stays true."""
        return merged.place

    def renumbered(self, positions: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
        """Overrides CompressingModelMixin.renumbered: coordinates say where in the video a token is."""
        return positions

    def next_position(self, positions: torch.Tensor) -> torch.Tensor:
        """
        Overrides CompressingModelMixin.next_position: behind a frame's longer side. Time may run ahead of the text
        that follows, as Qwen2.5-VL's does.
        """
        return positions[1:, :, -1:].amax(0) + 1

    def full_positions(
        self,
        start: torch.Tensor,
        is_real: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | list[float] | None = None,
    ) -> torch.Tensor:
        """
        Overrides CompressingModelMixin.full_positions: upstream's `get_rope_index` over a call's tokens.

        Args:
            start, is_real: As there.
            position_ids: (3, B, L), (4, B, L) with those of text first, or (B, L), where a caller has counted.
            mm_token_type_ids: (B, L), or more columns of which the last are meant: 0 text, 1 image, 2 video.
            image_grid_thw, video_grid_thw: (I, 3) and (V, 3), of the images and videos of this call.
            second_per_grid_ts: (V,), of these videos, where the model has a time axis that needs it.

        Returns:
            (3, B, L).

        Raises:
            ValueError: If position ids have a wrong shape, or kinds of tokens are not given or don't fit the grids.
        """
        if position_ids is not None:
            check_position_ids(position_ids, is_real.shape[1], 3)
            positions = position_ids.expand(3, -1, -1) if position_ids.ndim == 2 else position_ids[-3:]
            positions = positions.expand(-1, len(is_real), -1)
        else:
            types = self.check_token_types(mm_token_type_ids, is_real.shape[1])
            media = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
            # `inputs.to(dtype)` casts them, too; in bfloat16 a long video's patches would share their times.
            is_tensor = isinstance(second_per_grid_ts, torch.Tensor)
            media["second_per_grid_ts"] = second_per_grid_ts.float() if is_tensor else second_per_grid_ts
            try:
                # Of ids upstream takes the shape alone.
                positions, _ = self.get_rope_index(types.long(), types, attention_mask=is_real, **media)
            except (StopIteration, TypeError) as error:
                raise ValueError(
                    "mm_token_type_ids have more images or videos than grids were passed: pass image_grid_thw, "
                    "video_grid_thw and second_per_grid_ts of everything that the new tokens hold"
                ) from error
            positions = positions + start
        return repeated_over_padding(positions, is_real)

    def counted(
        self,
        past: CompressedSequence | None,
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None,
        position_inputs: dict,
    ) -> tuple[torch.Tensor, CompressedSequence]:
        """Overrides CompressingModelMixin.counted: every call with media leaves its next position on the cache."""
        batch_size, num_new = tokens.shape[:2]
        before = CompressedSequence.before_call(past, cached_length(cache), attention_mask, batch_size, tokens.device)
        is_real = before.is_real(attention_mask, num_new)
        positions = self.full_positions(before.next_position, is_real, position_ids, **position_inputs)
        record = replace(before.including(num_new, attention_mask), next_position=self.next_position(positions))
        return positions.masked_fill(~is_real, 0), record

    def check_token_types(self, mm_token_type_ids: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """(B, L) of (B, L) or more columns; raises a `ValueError` if there are fewer, or none."""
        if mm_token_type_ids is None:
            raise ValueError(
                "images or videos were passed without mm_token_type_ids, which say where they stand: pass those that "
                "the processor returns beside input_ids, with inputs_embeds, too"
            )
        if mm_token_type_ids.shape[1] < num_new:
            raise ValueError(
                f"mm_token_type_ids have shape {tuple(mm_token_type_ids.shape)}, for {num_new} new tokens: they must "
                "be as long as input_ids"
            )
        return mm_token_type_ids[:, mm_token_type_ids.shape[1] - num_new :]

    def compute_3d_position_ids(self, *args, **kwargs) -> None:
        """
        Overrides upstream's, which keeps `rope_deltas` of one conversation on the model: a call with images or videos
        has its positions already, and text alone needs no other than upstream's decoder counts by itself.
        """
        return None


class QwenGenerationMixin(HoliTomGenerationMixin):
    """[`HoliTomGenerationMixin`] for Qwen-VL backbones, whose positions are counted before videos are encoded."""

    def check_videos(self, input_ids: torch.Tensor | None, model_kwargs: dict) -> None:
        """Overrides HoliTomGenerationMixin.check_videos: with the grids, among tokens that are no text."""
        ids = self.model.placeholder_ids(input_ids, model_kwargs)
        self.model.check_placeholders(ids, model_kwargs["pixel_values_videos"], model_kwargs.get("video_grid_thw"))

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> torch.Tensor:
        """
        Overrides upstream's: positions of the tokens that are not cached yet, from the cache's record on.

        Returns:
            (3, B, P+L); what stands for the P positions before is never read.
        """
        mask, cache = model_kwargs["attention_mask"], model_kwargs.get(CACHE_NAME)
        record = CompressedSequence.of(cache, num_new_tokens=2)
        if record is not None:
            record = record.for_batch(len(mask))
        before = CompressedSequence.before_call(record, cached_length(cache), mask, len(mask), mask.device)
        num_new = mask.shape[1] - before.full_length
        is_real = before.is_real(mask, num_new)
        inputs = position_inputs(model_kwargs.get("mm_encoder_outputs"), **{n: model_kwargs.get(n) for n in GRIDS})
        if any(grids is not None for grids in inputs.values()):
            if model_kwargs.get("pixel_values_videos") is not None:
                tokens = model_kwargs.get("input_ids", inputs_tensor)
                is_ids = tokens.ndim == 2 and tokens.shape[1] >= num_new > 0
                self.check_videos(tokens[:, -num_new:] if is_ids else None, model_kwargs)
            for name in ("mm_token_type_ids", "second_per_grid_ts"):
                inputs[name] = model_kwargs.get(name)
            positions = self.model.full_positions(before.next_position, is_real, **inputs)
        else:
            positions = (before.next_position + is_real.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
        return F.pad(positions, (before.full_length, 0))


def position_inputs(mm_encoder_outputs: dict | None, **grids: torch.Tensor | None) -> dict:
    """Grids of a call, those of videos that were encoded before among them."""
    video = (mm_encoder_outputs or {}).get("video")
    if grids.get("video_grid_thw") is None and getattr(video, "grids", None):
        grids["video_grid_thw"] = torch.tensor(video.grids, device=video.pooler_output[0].device)
    return grids


def repeated_over_padding(positions: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """
    Positions (A, B, L) where padding repeats the last real one before it, or the first one's where there is none.

    Args:
        positions: (A, B, L).
        is_real: (B, L) bool.
    """
    place = torch.arange(is_real.shape[1], device=is_real.device)
    last = torch.where(is_real, place, -1).cummax(1).values
    first = is_real.to(torch.int8).argmax(1, keepdim=True)
    return positions.gather(-1, torch.where(last < 0, first, last).expand_as(positions))
