"""LLaVA-OneVision in vLLM with stages 1 and 2: fewer placeholders, and as many tokens out of the encoder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
    LlavaOnevisionVideoPixelInputs,
)
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.utils.tensor_schema import TensorShape

from ..merging.outer import merge_videos
from ..merging.video_tokens import VideoTokens
from .checkpoint import served_settings
from .processing import HoliTomMultiModalProcessorMixin, HoliTomProcessingInfoMixin
from .settings import RATIO, may_need_importance, num_placeholders
from .siglip import encode_changes, encode_frames, last_layer_importance
from .weight_names import PUBLISHED_TOWER, TOWER


class HoliTomLlavaOnevisionProcessingInfo(HoliTomProcessingInfoMixin, LlavaOnevisionProcessingInfo):
    """What a video costs: [`num_placeholders`]. Upstream's own numbers stay those of the uncompressed video."""

    @property
    def tokens_per_frame(self) -> int:
        """T: a frame's patches, pooled by two along both sides."""
        return math.ceil(self.get_vision_encoder_info().get_patch_grid_length() / 2) ** 2


class HoliTomLlavaOnevisionMultiModalProcessor(HoliTomMultiModalProcessorMixin, LlavaOnevisionMultiModalProcessor):
    """`LlavaOnevisionMultiModalProcessor` that puts as many placeholders as the compressed video has tokens."""

    info: HoliTomLlavaOnevisionProcessingInfo
    per_video = "pixel_values_videos"

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """Overrides LlavaOnevisionMultiModalProcessor._get_prompt_updates: videos have [`num_placeholders`]."""
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        settings = self.info.request_settings(hf_processor_mm_kwargs)
        video_token = self.info.get_hf_config().video_token_index

        def placeholders(item_idx: int) -> list[int]:
            num_frames = len(out_mm_kwargs["video"][item_idx]["pixel_values_videos"].data)
            return [video_token] * num_placeholders(settings, num_frames, self.info.tokens_per_frame)

        others = [update for update in updates if update.modality != "video"]
        return [*others, PromptReplacement(modality="video", target=[video_token], replacement=placeholders)]


class HoliTomLlavaOnevisionVideoPixelInputs(LlavaOnevisionVideoPixelInputs):
    """
    Videos, and what each keeps.

    Dimensions:
        - bn: Batch size * number of videos
    """

    retention_ratio: Annotated[torch.Tensor, TensorShape("bn")]


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomLlavaOnevisionMultiModalProcessor,
    info=HoliTomLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class HoliTomLlavaOnevisionForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """
    vLLM's `LlavaOnevisionForConditionalGeneration` whose encoder shortens videos.

    The tower, its attention kernels, the decoder and its cache are vLLM's. A video's tokens take the first positions
    and text follows on them: positions are numbered anew by there being fewer placeholders.

    Raises:
        ValueError: If settings need the attention, or the layers, of a tower that is not SigLIP, or more layers.
    """

    hf_to_vllm_mapper = (
        WeightsMapper(orig_to_new_regex={TOWER: PUBLISHED_TOWER})
        | LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = served_settings(vllm_config.model_config)
        is_siglip = isinstance(self.vision_tower, SiglipVisionModel)
        self.needs_importance = may_need_importance(self.settings)
        if self.needs_importance and not is_siglip:
            raise ValueError(
                f"outer_method={self.settings.outer_method!r} needs the attention of a SigLIP tower; this model's is "
                f"a {type(self.vision_tower).__name__}"
            )
        if self.settings.has_vision_stage:
            num_layers = len(self.vision_tower.vision_model.encoder.layers) if is_siglip else 0
            if self.settings.vision_reuse_layer >= num_layers:
                raise ValueError(
                    f"vision_reuse_layer={self.settings.vision_reuse_layer} needs a SigLIP tower of more layers; this "
                    f"model's is a {type(self.vision_tower).__name__}: set a lower one, or None"
                )
        vision_config = vllm_config.model_config.hf_config.vision_config
        self.tokens_per_frame = math.ceil(vision_config.image_size // vision_config.patch_size / 2) ** 2
        # The scheduler counts compressed tokens; the tower never takes more frames at once than fit uncompressed.
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.frames_at_once = max(1, budget // self.tokens_per_frame)

    def _parse_and_validate_video_input(self, **kwargs: object) -> LlavaOnevisionVideoPixelInputs | None:
        """Overrides LlavaOnevisionForConditionalGeneration._parse_and_validate_video_input: with each video's rate."""
        videos = super()._parse_and_validate_video_input(**kwargs)
        if videos is None:
            return None
        bindings = dict.fromkeys(("h", "w"), self.config.vision_config.image_size)
        return HoliTomLlavaOnevisionVideoPixelInputs(
            type=videos["type"],
            pixel_values_videos=videos["pixel_values_videos"],
            retention_ratio=kwargs[RATIO],
            resolve_bindings=bindings,
        )

    def _process_video_pixels(self, inputs: HoliTomLlavaOnevisionVideoPixelInputs) -> list[torch.Tensor]:
        """
        Overrides LlavaOnevisionForConditionalGeneration._process_video_pixels.

        Returns:
            For each video (N_v, D), as many tokens as it has placeholders.
        """
        tokens = []
        videos = list(inputs["pixel_values_videos"])
        ratios = iter(inputs["retention_ratio"].tolist())
        for some in self.encoded_at_once(videos):
            settings = [self.settings.overlaid({RATIO: next(ratios)}) for _ in some]
            tokens += merge_videos(self.encode_videos(some), *settings)[1]
        return tokens

    def encoded_at_once(self, videos: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Videos (F_v, C, H, W) in groups of at most `frames_at_once` frames, or of one that has more."""
        group, num_frames = [], 0
        for video in videos:
            if group and num_frames + len(video) > self.frames_at_once:
                yield group
                group, num_frames = [], 0
            group.append(video)
            num_frames += len(video)
        if group:
            yield group

    def encode_videos(self, videos: list[torch.Tensor]) -> list[VideoTokens]:
        """What the tower sees in V videos (F_v, C, H, W), frames of all of them together."""
        num_frames = [len(video) for video in videos]
        chunks = torch.cat(videos).split(self.frames_at_once)
        if self.settings.has_vision_stage:
            parts = self.encode_changes(chunks, num_frames)
        else:
            parts = map(self.encode_frames, chunks)
        maps = [torch.cat(part).split(num_frames) for part in zip(*parts)]
        return [VideoTokens(*tokens, newline=self.image_newline) for tokens in zip(*maps)]

    def encode_frames(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Features (F, T, D) of F frames (F, C, H, W), and where settings need them importance (F, T), keys (F, T, K).
        """
        if not self.needs_importance:
            return (self._video_pixels_to_features(self.vision_tower, pixels),)
        layers = self.vision_tower.vision_model.encoder.layers
        hidden_states = encode_frames(self.vision_tower, pixels, len(layers) - 1)
        importance = self.pooled_importance(hidden_states)
        hidden_states, _ = layers[-1](hidden_states)
        return self.apply_pooling(self.multi_modal_projector(hidden_states)), *importance

    def encode_changes(
        self, chunks: Sequence[torch.Tensor], num_frames: list[int]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """As [`encode_frames`], of some frames after others: patches that repeat are computed once."""
        parts = encode_changes(self.vision_tower, chunks, num_frames, self.settings, self.frames_at_once)
        for before, rows, slot in parts:
            features = self.apply_pooling(self.multi_modal_projector(rows)[slot])
            yield features, *(self.pooled_importance(before, slot) if self.needs_importance else ())

    def pooled_importance(self, *hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance (F, T) and keys (F, T, K) from what goes into the last layer, as [`last_layer_importance`]."""
        last_layer = self.vision_tower.vision_model.encoder.layers[-1]
        importance, keys = last_layer_importance(last_layer, *hidden_states)
        return self.apply_pooling(importance[..., None])[..., 0], self.apply_pooling(keys)
