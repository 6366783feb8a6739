"""What is special to a backbone where it is measured: the form of its videos and prompts, and its vision tower."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, BatchFeature

from ..configuration import HoliTomConfig
from ..models.operations import EncoderOperations
from ..models.qwen_vl.vision import block_importance
from ..models.registry import backbone_class, encoder_operations
from ..models.vision_importance import vision_importance
from .synthetic import SyntheticFeatures, SyntheticPooling


NUM_TIME_TOKENS = 6  # as many as "<1.5 seconds>" has
NO_STAGES = HoliTomConfig(outer_method="none", inner_method="none")


class MeasuredBackbone:
    """
    One video of a backbone, as the benchmark asks about it.

    Attributes:
        operations: Sizes of the video, and what is multiplied before the decoder.
        size: Height and width of frames in pixels.
        repeating_side: Side of the squares of a frame that repeat as a whole, in pixels.
        frames_together: Frames that the method sees as one.
        clip_size: Width and height of the file that is decoded.
    """

    frames_together = 1
    clip_size = (1280, 720)

    def __init__(self, config, num_frames: int, size: tuple[int, int] | None = None):
        """
        Args:
            config: Of the backbone.
            num_frames: Of the video.
            size: As in the backbone's `encoder_operations`.

        Raises:
            ValueError: If the backbone takes no frames of this size.
        """
        self.config, self.num_frames = config, num_frames
        self.operations: EncoderOperations = encoder_operations(config, num_frames, size, NO_STAGES)

    @staticmethod
    def plain_config(config):
        """The uncompressed model's: upstream's class with the values of ours."""
        own = ("holitom_config", "auto_map", "custom_pipelines", "model_type")
        values = {name: value for name, value in config.to_dict().items() if name not in own}
        return AutoConfig.for_model(config.model_type, **values)

    def video_ids(self, random: torch.Generator) -> torch.Tensor:
        """(N,), a video's part of a prompt."""
        raise NotImplementedError

    def media(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of the models for frames (B, F, 3, H, W): every entry is as long as B, or a multiple of it."""
        raise NotImplementedError

    def token_kinds(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further arguments, (B, L) each."""
        return {}

    def show(self, model, features: torch.Tensor) -> None:
        """Lets a model's decoder see features (B*F, T, D) in place of what the tower's random weights make."""
        raise NotImplementedError

    def tower(self, model) -> nn.Module:
        """A model's vision tower."""
        raise NotImplementedError

    def importance(self, model, media: dict[str, torch.Tensor]) -> Callable[[], object]:
        """A function that computes the importance of every token, as encoding does."""
        raise NotImplementedError

    def processor(self):
        """Of video files: it takes as many frames as the video has."""
        return backbone_class(self.config.backbone, "video_processor")(num_frames=self.num_frames)

    def preprocess(self, processor, frames: torch.Tensor, device: torch.device) -> BatchFeature:
        """Decoded frames as the model takes them, resized to `size`."""
        raise NotImplementedError


class LlavaOnevision(MeasuredBackbone):
    """Frames of one size, a newline behind them."""

    def __init__(self, config, num_frames: int, size: tuple[int, int] | None = None):
        super().__init__(config, num_frames, size)
        vision = config.vision_config
        self.size = (vision.image_size, vision.image_size)
        self.repeating_side = vision.patch_size

    def video_ids(self, random: torch.Generator) -> torch.Tensor:
        """Overrides MeasuredBackbone.video_ids."""
        count = self.operations.num_frames * self.operations.tokens_per_frame + self.operations.num_newlines
        return torch.full((count,), self.config.video_token_id)

    def media(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Overrides MeasuredBackbone.media: the frames themselves."""
        return {"pixel_values_videos": frames}

    def show(self, model, features: torch.Tensor) -> None:
        """Overrides MeasuredBackbone.show."""
        model.model.apply_pooling = SyntheticPooling(model.model.apply_pooling, features)

    def tower(self, model) -> nn.Module:
        """Overrides MeasuredBackbone.tower."""
        return model.model.vision_tower

    def importance(self, model, media: dict[str, torch.Tensor]) -> Callable[[], object]:
        """Overrides MeasuredBackbone.importance: of the last layer that feeds the projector, pooled."""
        pixels = media["pixel_values_videos"]
        hidden_index, layer = model.model.importance_layer([self.config.vision_feature_layer])
        hidden = torch.cat(
            [
                self.tower(model)(chunk, output_hidden_states=True).hidden_states[hidden_index]
                for chunk in pixels.flatten(0, 1).split(model.model.frames_per_chunk(pixels.shape[1]))
            ]
        )
        return lambda: model.model.apply_pooling(vision_importance(layer, hidden)[0][..., None])

    def preprocess(self, processor, frames: torch.Tensor, device: torch.device) -> BatchFeature:
        """Overrides MeasuredBackbone.preprocess."""
        height, width = self.size
        return processor(frames, size={"height": height, "width": width}, device=str(device), return_tensors="pt")


class LlavaVideo(LlavaOnevision):
    """[`LlavaOnevision`] with a newline after every row; transformers has no class of it to compare with."""

    @staticmethod
    def plain_config(config):
        """Overrides MeasuredBackbone.plain_config: ours with settings that change nothing."""
        plain = copy.deepcopy(config)
        plain.holitom_config = NO_STAGES
        return plain

    def processor(self):
        """Overrides MeasuredBackbone.processor: frames by number, not by rate."""
        return backbone_class(self.config.backbone, "video_processor")(num_frames=self.num_frames, fps=None)


class QwenVL(MeasuredBackbone):
    """Flat patches with a grid, frames in pairs; by default all of a video's tokens stand behind each other."""

    def __init__(self, config, num_frames: int, size: tuple[int, int] | None = None):
        super().__init__(config, num_frames, size)
        vision = config.vision_config
        self.frames_together = vision.temporal_patch_size
        self.repeating_side = unit = vision.patch_size * vision.spatial_merge_size
        side = round(self.operations.tokens_per_frame**0.5) * unit
        self.size = (side, side) if size is None else tuple(size)
        # Twice the frames, so that resizing has something to do and comes to this size exactly.
        self.clip_size = (2 * self.size[1], 2 * self.size[0])

    def video_ids(self, random: torch.Generator) -> torch.Tensor:
        """Overrides MeasuredBackbone.video_ids."""
        return self.visual_ids(self.operations.num_frames)

    def visual_ids(self, num_frames: int) -> torch.Tensor:
        """(N,), the tokens of consecutive frames between those that say that vision begins and ends."""
        config, count = self.config, num_frames * self.operations.tokens_per_frame
        ids = [config.vision_start_token_id, *[config.video_token_id] * count, config.vision_end_token_id]
        return torch.tensor(ids)

    def media(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Overrides MeasuredBackbone.media: patches as upstream's processor makes them, and grids."""
        raw = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_sample_frames"), False)
        features = self.processor()(list(frames), return_tensors="pt", **raw)
        names = ("pixel_values_videos", "video_grid_thw")
        media = {name: features[name].to(frames.device) for name in names}
        media["pixel_values_videos"] = media["pixel_values_videos"].to(frames.dtype)
        return media

    def token_kinds(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Overrides MeasuredBackbone.token_kinds: 2 where a token is a video's."""
        return {"mm_token_type_ids": 2 * (input_ids == self.config.video_token_id).int()}

    def show(self, model, features: torch.Tensor) -> None:
        """Overrides MeasuredBackbone.show."""
        by_video = features.unflatten(0, (-1, self.operations.num_frames)).flatten(1, 2)
        model.model.get_video_features = SyntheticFeatures(model.model.get_video_features, by_video)

    def tower(self, model) -> nn.Module:
        """Overrides MeasuredBackbone.tower."""
        return model.model.visual

    def importance(self, model, media: dict[str, torch.Tensor]) -> Callable[[], object]:
        """Overrides MeasuredBackbone.importance: of the tower's last block."""
        tower = self.tower(model)
        encoded = model.get_video_features(
            **media, output_hidden_states=True, holitom_config=NO_STAGES, return_dict=True
        )
        hidden_states = encoded.hidden_states[-2]
        return lambda: block_importance(tower, hidden_states, media["video_grid_thw"])

    def processor(self):
        """Overrides MeasuredBackbone.processor: of the tower's patches."""
        vision = self.config.vision_config
        return backbone_class(self.config.backbone, "video_processor")(
            num_frames=self.num_frames,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            cap_pixels_per_frame=False,
        )

    def preprocess(self, processor, frames: torch.Tensor, device: torch.device) -> BatchFeature:
        """Overrides MeasuredBackbone.preprocess."""
        pixels = self.bounded_frames * self.size[0] * self.size[1]
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        return processor(frames, size=size, do_sample_frames=False, device=str(device), return_tensors="pt")

    @property
    def bounded_frames(self) -> int:
        """How many frames it is whose pixels the processor's `size` bounds."""
        return 1


class Qwen3VL(QwenVL):
    """Qwen3-VL and the families after it: [`QwenVL`] with text between temporal patches, which says their times."""

    def video_ids(self, random: torch.Generator) -> torch.Tensor:
        """Overrides MeasuredBackbone.video_ids."""
        parts = []
        for _ in range(self.operations.num_frames):
            time = torch.randint(0, self.config.vision_start_token_id, (NUM_TIME_TOKENS,), generator=random)
            parts += [time, self.visual_ids(1)]
        return torch.cat(parts)

    @property
    def bounded_frames(self) -> int:
        """Overrides QwenVL.bounded_frames: those of a video together."""
        return self.num_frames


# By `model_type`.
MEASURED: dict[str, type[MeasuredBackbone]] = {
    "llava_onevision": LlavaOnevision,
    "llava_video": LlavaVideo,
    "qwen2_5_vl": QwenVL,
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), Qwen3VL),
}
