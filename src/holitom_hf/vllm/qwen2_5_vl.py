"""Qwen2.5-VL in vLLM with stages 1 and 2: tokens keep the places they stand for."""

from collections.abc import Mapping, Sequence

import torch
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
    Qwen2_5_VLVideoPixelInputs,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from ..merging.budget import token_budget
from ..merging.outer import merge_videos
from ..merging.video_tokens import VideoTokens
from .kept_positions import as_channels, video_offsets
from .processing import HoliTomMultiModalProcessorMixin, HoliTomProcessingInfoMixin
from .qwen_vl import HoliTomQwenVLMixin
from .settings import RATIO


class HoliTomQwen2_5_VLProcessingInfo(HoliTomProcessingInfoMixin, Qwen2_5_VLProcessingInfo):
    """`Qwen2_5_VLProcessingInfo` with settings."""

    keeps_positions = True


class HoliTomQwen2_5_VLMultiModalProcessor(HoliTomMultiModalProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    """`Qwen2_5_VLMultiModalProcessor` that puts as many placeholders as the compressed video has tokens."""

    info: HoliTomQwen2_5_VLProcessingInfo
    per_video = "video_grid_thw"

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """
        Overrides BaseMultiModalProcessor._call_hf_processor: how long a temporal patch lasts stays in float32, where
        upstream rounds it to the model's dtype, and late patches of a long video would stand elsewhere.
        """
        processor, name, exact = self.info.get_hf_processor(**hf_kwargs), "second_per_grid_ts", {}

        def keeping_seconds(**inputs: object) -> BatchFeature:
            outputs = processor(**inputs)
            if name in outputs:
                exact[name] = outputs[name]
            return outputs

        outputs = self.info.ctx.call_hf_processor(keeping_seconds, hf_data, hf_kwargs)
        outputs.update(exact)
        return outputs

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """Overrides Qwen2_5_VLMultiModalProcessor._get_prompt_updates: as many tokens as [`token_budget`] says."""
        settings = self.info.request_settings(hf_processor_mm_kwargs)
        upstream_kwargs = {name: value for name, value in hf_processor_mm_kwargs.items() if name != RATIO}
        updates = super()._get_prompt_updates(mm_items, upstream_kwargs, out_mm_kwargs)
        config = self.info.get_hf_config()

        def placeholders(item_idx: int) -> list[int]:
            num_frames, height, width = out_mm_kwargs["video"][item_idx]["video_grid_thw"].data.tolist()
            tokens_per_frame = height * width // config.vision_config.spatial_merge_size**2
            return [config.video_token_id] * token_budget(settings, num_frames, tokens_per_frame)

        return [
            PromptReplacement(modality="video", target=update.target, replacement=placeholders)
            if update.modality == "video"
            else update
            for update in updates
        ]


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen2_5_VLMultiModalProcessor,
    info=HoliTomQwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class HoliTomQwen2_5_VLForConditionalGeneration(HoliTomQwenVLMixin, Qwen2_5_VLForConditionalGeneration):
    """
    vLLM's `Qwen2_5_VLForConditionalGeneration` whose encoder shortens videos.

    A token takes the position along all three axes of what it stands for. Text goes on behind a frame's longer side,
    as in transformers 5 and with `position_ids="kept"`; upstream here lets it go on behind the last frame's time.
    """

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: list[VideoTokens], video_input: Qwen2_5_VLVideoPixelInputs
    ) -> tuple[torch.Tensor, ...]:
        """
        Overrides Qwen2_5_VLForConditionalGeneration._postprocess_video_embeds_evs: merged where upstream drops, with
        times that are rounded once, in patches.
        """
        embeddings = []
        seconds, ratios = video_input["second_per_grid_ts"], video_input[RATIO].tolist()
        for video, seconds_per_patch, ratio in zip(video_embeds_split, seconds, ratios):
            (merged,), (tokens,) = merge_videos([video], self.settings.overlaid({RATIO: ratio}))
            order = merged.place.argsort()
            interval = self.config.vision_config.tokens_per_second * seconds_per_patch
            times = (torch.arange(video.num_frames, device=interval.device) * interval).long()
            channels = as_channels(video_offsets(merged.place[order], times.to(tokens.device), video.grid))
            embeddings.append(torch.cat([tokens[order], channels.to(tokens.dtype)], dim=1))
        return tuple(embeddings)

    def positions_of_video(self, tokens: list[int], num_frames: int, longer_side: int) -> int:
        """Overrides KeptPositionsMixin.positions_of_video: time may run ahead of the text that follows."""
        return longer_side
