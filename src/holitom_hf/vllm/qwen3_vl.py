"""Qwen3-VL in vLLM with stages 1 and 2: tokens keep the places they stand for."""

from collections.abc import Mapping, Sequence

import torch
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLVideoPixelInputs
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from ..merging.budget import token_budget
from ..merging.outer import merge_videos
from ..merging.video_tokens import VideoTokens
from .kept_positions import as_channels, timed_offsets
from .processing import HoliTomMultiModalProcessorMixin, HoliTomProcessingInfoMixin
from .qwen_vl import HoliTomQwenVLMixin
from .settings import RATIO


class HoliTomQwen3VLProcessingInfo(HoliTomProcessingInfoMixin, Qwen3VLProcessingInfo):
    """`Qwen3VLProcessingInfo` with settings."""

    keeps_positions = True


class HoliTomQwen3VLMultiModalProcessor(HoliTomMultiModalProcessorMixin, Qwen3VLMultiModalProcessor):
    """`Qwen3VLMultiModalProcessor` that puts as many placeholders as the compressed video has tokens."""

    info: HoliTomQwen3VLProcessingInfo
    per_video = "video_grid_thw"

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """Overrides Qwen3VLMultiModalProcessor._get_prompt_updates: as many tokens as [`token_budget`] says."""
        settings = self.info.request_settings(hf_processor_mm_kwargs)
        upstream_kwargs = {name: value for name, value in hf_processor_mm_kwargs.items() if name != RATIO}
        updates = super()._get_prompt_updates(mm_items, upstream_kwargs, out_mm_kwargs)
        config, tokenizer = self.info.get_hf_config(), self.info.get_tokenizer()

        def placeholders(item_idx: int):
            video = out_mm_kwargs["video"][item_idx]
            num_frames, height, width = video["video_grid_thw"].data.tolist()
            tokens_per_frame = height * width // config.vision_config.spatial_merge_size**2
            # As upstream's pruning does: all in the first frame. The model puts them, and times, where they belong.
            num_tokens = [token_budget(settings, num_frames, tokens_per_frame)] + [0] * (num_frames - 1)
            return self.get_video_repl(
                tokens_per_frame=num_tokens,
                timestamps=video["timestamps"].data,
                tokenizer=tokenizer,
                vision_start_token_id=config.vision_start_token_id,
                vision_end_token_id=config.vision_end_token_id,
                video_token_id=config.video_token_id,
            )

        return [
            PromptReplacement(modality="video", target=update.target, replacement=placeholders)
            if update.modality == "video"
            else update
            for update in updates
        ]


class HoliTomQwen3VLMixin(HoliTomQwenVLMixin):
    """
    For vLLM's `Qwen3VLForConditionalGeneration` and what is derived from it, before upstream's class: an encoder that
    shortens videos.

    A token takes the place, and the position along all three axes, of what it stands for; text goes on behind all of
    the uncompressed video, as with `position_ids="kept"`.
    """

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: list[VideoTokens], video_input: Qwen2_5_VLVideoPixelInputs
    ) -> tuple[torch.Tensor, ...]:
        """
        Overrides Qwen3VLForConditionalGeneration._postprocess_video_embeds_evs: merged where upstream drops, then
        times and positions as upstream adds them.
        """
        grids, ratios = video_input["video_grid_thw"].tolist(), video_input[RATIO].tolist()
        embeddings = []
        for index, (video, grid, ratio) in enumerate(zip(video_embeds_split, grids, ratios)):
            (merged,), (tokens,) = merge_videos([video], self.settings.overlaid({RATIO: ratio}))
            order = merged.place.argsort()
            is_kept = torch.zeros(merged.num_input_tokens, dtype=torch.bool, device=tokens.device)
            is_kept.index_fill_(0, merged.place, True)
            embeddings.append(
                self._create_final_video_embeddings(
                    video_embeddings=torch.cat([tokens, *map(merged.apply, video.maps)], dim=-1)[order],
                    num_tokens_per_frame=is_kept.view(grid[0], -1).sum(1).tolist(),
                    timestamps=video_input.timestamps[index],
                    video_grid_thw=grid,
                    retention_mask=is_kept,
                )
            )
        return tuple(embeddings)

    def _get_expanded_positions(
        self, device, seq_len, video_grid_thw, is_video_embed, is_vision_start, retention_mask, **kwargs
    ) -> torch.Tensor:
        """Overrides Qwen3VLForConditionalGeneration._get_expanded_positions: as channels that bfloat16 can hold."""
        grid = tuple(side // self.visual.spatial_merge_size for side in video_grid_thw[1:])
        # A frame ends with the token behind its last one, or behind its start where none is left.
        place = retention_mask.nonzero()[:, 0]
        starts = is_vision_start.nonzero()[:, 0]
        kept = torch.bincount(place // (grid[0] * grid[1]), minlength=video_grid_thw[0])
        is_end = torch.zeros_like(is_vision_start).index_fill_(0, starts + kept + 1, True)
        return as_channels(timed_offsets(is_video_embed, is_end, place, grid))

    def positions_of_video(self, tokens: list[int], num_frames: int, longer_side: int) -> int:
        """Overrides KeptPositionsMixin.positions_of_video: text between frames, and each frame's longer side."""
        num_text = sum(token != self.config.video_token_id for token in tokens)
        return num_text + num_frames * longer_side


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen3VLMultiModalProcessor,
    info=HoliTomQwen3VLProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class HoliTomQwen3VLForConditionalGeneration(HoliTomQwen3VLMixin, Qwen3VLForConditionalGeneration):
    """vLLM's `Qwen3VLForConditionalGeneration` whose encoder shortens videos."""
