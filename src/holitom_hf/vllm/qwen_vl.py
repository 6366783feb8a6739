"""What the Qwen-VL families' models do alike: from pixels to videos that can be merged."""

from typing import Annotated

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLVideoPixelInputs
from vllm.utils.tensor_schema import TensorShape

from ..merging.video_tokens import VideoTokens
from ..models.qwen_vl.window_check import check_sees_frame
from .checkpoint import served_settings
from .qwen_importance import last_attention_importance, last_attention_input
from .qwen_positions import KeptPositionsMixin
from .settings import RATIO, may_need_importance


class HoliTomQwenVideoPixelInputs(Qwen2_5_VLVideoPixelInputs):
    """
    Videos, and what each keeps.

    Dimensions:
        - nv: Number of videos
    """

    retention_ratio: Annotated[torch.Tensor, TensorShape("nv")]


class HoliTomQwenVLMixin(KeptPositionsMixin):
    """
    For a model of a Qwen-VL family, before upstream's class: its encoder knows each video's rate and what its tokens
    received of the tower's attention.

    Raises:
        ValueError: With several stages of a pipeline, or if importance is asked of a tower that does not tell it.
    """

    # The scheduler counts compressed tokens: one uncompressed video at a time goes through the tower.
    requires_sequential_video_encoding = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = served_settings(vllm_config.model_config, keeps_positions=True)
        if not may_need_importance(self.settings):
            return
        check_sees_frame(self.visual)
        if self.use_data_parallel:
            raise ValueError(
                f"outer_method={self.settings.outer_method!r} needs the tower's attention, which a tower divided by "
                'frames (mm_encoder_tp_mode="data") does not tell: choose "weights"'
            )

    def _parse_and_validate_video_input(self, **kwargs: object):
        """Overrides upstream's _parse_and_validate_video_input: with each video's rate."""
        videos = super()._parse_and_validate_video_input(**kwargs)
        if videos is None or videos["type"] != "pixel_values_videos":
            return videos
        names = ("type", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "timestamps")
        fields = {name: getattr(videos, name) for name in names}
        return HoliTomQwenVideoPixelInputs(**fields, retention_ratio=kwargs[RATIO])

    def _process_video_input(self, video_input: Qwen2_5_VLVideoPixelInputs) -> list[VideoTokens]:
        """Overrides upstream's _process_video_input: DeepStack's features, if there are any, are maps beside."""
        grids = video_input["video_grid_thw"].tolist()
        merge_size, dim = self.visual.spatial_merge_size, self.config.vision_config.out_hidden_size
        lowest = self.settings.overlaid({RATIO: min(video_input[RATIO].tolist())})
        if lowest.needs_importance:
            with last_attention_input(self.visual) as seen:
                embeddings = super()._process_video_input(video_input)
            importance = last_attention_importance(self.visual, seen, grids)
        else:
            embeddings = super()._process_video_input(video_input)
            importance = [(None, None)] * len(grids)
        videos = []
        for tokens, (num_frames, height, width), (received, keys) in zip(embeddings, grids, importance):
            features, deepstack = tokens.unflatten(0, (num_frames, -1)).tensor_split((dim,), dim=-1)
            grid = (height // merge_size, width // merge_size)
            maps = (deepstack,) if deepstack.shape[-1] else ()
            videos.append(VideoTokens(features, received, keys, grid=grid, maps=maps))
        return videos
