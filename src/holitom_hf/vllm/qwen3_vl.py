"""Qwen3-VL in vLLM with stages 1 and 2: tokens keep the places they stand for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
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
from vllm.utils.tensor_schema import TensorShape

from ..merging.budget import token_budget
from ..merging.outer import merge_videos
from ..merging.video_tokens import VideoTokens
from ..models.vision_importance import received_attention
from .checkpoint import served_settings
from .kept_positions import NUM_CHANNELS, as_channels, from_channels, prompt_positions, timed_offsets
from .processing import HoliTomMultiModalProcessorMixin, HoliTomProcessingInfoMixin
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


class HoliTomQwen3VLVideoPixelInputs(Qwen2_5_VLVideoPixelInputs):
    """
    Videos, and what each keeps.

    Dimensions:
        - nv: Number of videos
    """

    retention_ratio: Annotated[torch.Tensor, TensorShape("nv")]


@contextmanager
def last_attention_input(tower: nn.Module) -> Iterator[dict]:
    """What goes into the attention of a tower's last block while this lasts: its named arguments, and `x`."""
    seen = {}

    def see(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs, x=args[0])

    # Of the attention: vLLM's blocks, which it may compile, call no hooks.
    hook = tower.blocks[-1].attn.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def last_attention_importance(
    attention: nn.Module, seen: dict, grids: list[list[int]], merge_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    What each token receives of an attention, from its own input, fused projection and rotary embedding. It runs on
    whichever kernel it has.

    Args:
        attention: Of a block of vLLM's Qwen3-VL.
        seen: From [`last_attention_input`].
        grids: (T, h, w) of every video.
        merge_size: Side of the square of patches that makes a token.

    Returns:
        For each video (F, T) float32, and the keys before rotation, averaged over heads and the square, (F, T, K).
    """
    projected, _ = attention.qkv(seen["x"])  # (P, 1, 3 * heads * d)
    heads = (3, attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head)
    queries_keys = projected.squeeze(1).unflatten(-1, heads)[:, :2].transpose(0, 1).contiguous()  # (2, P, heads, d)
    rotated = attention.apply_rotary_emb(queries_keys, seen["rotary_pos_emb_cos"], seen["rotary_pos_emb_sin"])
    num_patches = [frames * height * width for frames, height, width in grids]
    plain = queries_keys[1].mean(1)
    found = []
    for (num_frames, _, _), video, keys in zip(grids, rotated.split(num_patches, 1), plain.split(num_patches)):
        queries, rotated_keys = video.unflatten(1, (num_frames, -1)).transpose(2, 3)
        received = received_attention(queries, rotated_keys, attention.hidden_size_per_attention_head**-0.5)
        received = received.unflatten(1, (-1, merge_size**2)).mean(2)
        head_mean = keys.unflatten(0, (num_frames, -1, merge_size**2)).mean(2)
        if attention.tp_size > 1:
            received = tensor_model_parallel_all_reduce(received) / attention.tp_size
            head_mean = tensor_model_parallel_all_reduce(head_mean) / attention.tp_size
        found.append((received, head_mean))
    return found


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen3VLMultiModalProcessor,
    info=HoliTomQwen3VLProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class HoliTomQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """
    vLLM's `Qwen3VLForConditionalGeneration` whose encoder shortens videos.

    A token takes the place, and the position along all three axes, of what it stands for; text goes on behind all of
    the uncompressed video, as with `position_ids="kept"`.
    """

    # Runners leave positions alone; this class adds what a video's tokens need.
    supports_multimodal_pruning = False
    # The scheduler counts compressed tokens: one uncompressed video at a time goes through the tower.
    requires_sequential_video_encoding = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # Their addresses stay, as graphs of the decoder need it.
        self.offsets, self.shifted = (torch.zeros(3, num_tokens + 1, dtype=torch.long) for _ in range(2))
        self.has_offsets = False
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("positions of kept tokens are known to the first stage of a pipeline alone")
        self.settings = served_settings(vllm_config.model_config, keeps_positions=True)
        if self.settings.needs_importance and self.use_data_parallel:
            raise ValueError(
                f"outer_method={self.settings.outer_method!r} needs the tower's attention, which a tower divided by "
                'frames (mm_encoder_tp_mode="data") does not tell: choose "weights"'
            )

    def _parse_and_validate_video_input(self, **kwargs: object):
        """Overrides Qwen3VLForConditionalGeneration._parse_and_validate_video_input: with each video's rate."""
        videos = super()._parse_and_validate_video_input(**kwargs)
        if videos is None or videos["type"] != "pixel_values_videos":
            return videos
        names = ("type", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "timestamps")
        fields = {name: getattr(videos, name) for name in names}
        return HoliTomQwen3VLVideoPixelInputs(**fields, retention_ratio=kwargs[RATIO])

    def _process_video_input(self, video_input: Qwen2_5_VLVideoPixelInputs) -> list[VideoTokens]:
        """Overrides Qwen3VLForConditionalGeneration._process_video_input: DeepStack's features are maps beside."""
        grids = video_input["video_grid_thw"].tolist()
        merge_size = self.visual.spatial_merge_size
        if self.settings.needs_importance:
            with last_attention_input(self.visual) as seen:
                embeddings = super()._process_video_input(video_input)
            importance = last_attention_importance(self.visual.blocks[-1].attn, seen, grids, merge_size)
        else:
            embeddings = super()._process_video_input(video_input)
            importance = [(None, None)] * len(grids)
        videos = []
        for tokens, (num_frames, height, width), (received, keys) in zip(embeddings, grids, importance):
            features, deepstack = tokens.unflatten(0, (num_frames, -1)).tensor_split((self.visual_dim,), dim=-1)
            grid = (height // merge_size, width // merge_size)
            videos.append(VideoTokens(features, received, keys, grid=grid, maps=(deepstack,)))
        return videos

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

    def _postprocess_image_embeds_evs(self, image_embeds_split, image_input) -> tuple[torch.Tensor, ...]:
        """Overrides Qwen3VLForConditionalGeneration._postprocess_image_embeds_evs: positions are known."""
        return tuple(torch.nn.functional.pad(tokens, (0, NUM_CHANNELS)) for tokens in image_embeds_split)

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

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """Overrides Qwen3VLForConditionalGeneration.get_mrope_input_positions: a video's tokens have its first one."""
        merge_size, media = self.config.vision_config.spatial_merge_size, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin, length = feature.mm_position.offset, feature.mm_position.length
            num_frames, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            rows, columns = height // merge_size, width // merge_size
            if feature.modality == "image":
                places = torch.arange(rows * columns)
                offsets = torch.stack([0 * places, places // columns, places % columns])
                media.append((begin, offsets, max(rows, columns)))
                continue
            num_text = sum(token != self.config.video_token_id for token in input_tokens[begin : begin + length])
            offsets = torch.zeros(3, length, dtype=torch.long)
            media.append((begin, offsets, num_text + num_frames * max(rows, columns)))
        return prompt_positions(len(input_tokens), media)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None) -> torch.Tensor:
        """Overrides Qwen3VLForConditionalGeneration.embed_input_ids: keeps what `forward` adds to positions."""
        if self.has_offsets:
            self.offsets.zero_()
        self.has_offsets = bool(multimodal_embeddings)
        if multimodal_embeddings:
            channels = torch.cat([tokens[:, -NUM_CHANNELS:] for tokens in multimodal_embeddings])
            places = is_multimodal.nonzero()[:, 0].to(self.offsets.device)
            self.offsets[:, places] = from_channels(channels).T
            multimodal_embeddings = [tokens[:, :-NUM_CHANNELS] for tokens in multimodal_embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """Overrides Qwen3VLForConditionalGeneration.forward: a video's tokens stand where they stood uncompressed."""
        num_tokens = positions.shape[-1]
        shifted = torch.add(positions, self.offsets[:, :num_tokens], out=self.shifted[:, :num_tokens])
        return super().forward(input_ids, shifted, intermediate_tensors, inputs_embeds, **kwargs)
