"""From pixels to features: LLaVA-Video's pooling, and its newlines."""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...merging.merged_video import MergedVideo, TokenKind
from ...merging.settings import MergingSettings
from ...merging.video_tokens import VideoTokens
from ...sequence.placeholders import assign_videos
from ..llava_onevision.vision import LlavaOnevisionVisionMixin
from ..vision import HoliTomVideoFeatures
from .layout import GRID


@dataclass
class GridVideoTokens(VideoTokens):
    """A video whose uncompressed form has a newline after every row of every frame."""

    @property
    def num_slots(self) -> int:
        """Overrides VideoTokens.num_slots: a placeholder for each of those newlines, too."""
        return self.num_frames * (self.tokens_per_frame + self.grid[0])


class LlavaVideoVisionMixin:
    """For the model, before LLaVA-OneVision's: what is different between the tower and the decoder."""

    def check_placeholders(self, input_ids: torch.Tensor | None, pixel_values_videos) -> None:
        """Overrides LlavaOnevisionVisionMixin.check_placeholders: as many as the configuration's layout has."""
        super().check_placeholders(None, pixel_values_videos)
        if input_ids is not None and not torch.compiler.is_compiling():
            expected = [self.config.layout.num_tokens(len(frames)) for frames in pixel_values_videos]
            assign_videos((input_ids == self.config.video_token_id).sum(1).tolist(), expected)

    def apply_pooling(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Overrides LlavaOnevisionVisionMixin.apply_pooling: as the configuration says.

        Args:
            image_features: (f, P, D) patches.

        Returns:
            (f, T, D) tokens.
        """
        layout = self.config.layout
        frames = image_features.unflatten(1, (layout.patch_side,) * 2).permute(0, 3, 1, 2)
        if layout.pool_mode == "bilinear":
            pooled = F.interpolate(frames, size=(layout.side,) * 2, mode="bilinear")
        else:
            pooled = (F.avg_pool2d if layout.pool_mode == "average" else F.max_pool2d)(frames, layout.stride)
        return pooled.permute(0, 2, 3, 1).flatten(1, 2)

    # `generate` reads there which arguments it may pass.
    @functools.wraps(LlavaOnevisionVisionMixin.get_video_features)
    def get_video_features(self, *args, return_dict: bool | None = None, **kwargs):
        """Overrides LlavaOnevisionVisionMixin.get_video_features: newlines stand behind rows, in the grid layout."""
        video = super().get_video_features(*args, return_dict=True, **kwargs)
        if self.config.newline_layout == GRID:
            side, videos = self.config.layout.side, []
            for tokens in video.pooler_output:
                rows = tokens[:-1].unflatten(0, (-1, side))  # (F*H, W, D)
                newlines = tokens[-1].expand(len(rows), 1, -1)
                videos.append(torch.cat([rows, newlines], dim=1).flatten(0, 1))
            is_even = isinstance(video.pooler_output, torch.Tensor)
            video.pooler_output = torch.stack(videos) if is_even else videos
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return video if return_dict else video.to_tuple()

    def video_tokens(self, video: HoliTomVideoFeatures) -> list[VideoTokens]:
        """Overrides LlavaOnevisionVisionMixin.video_tokens: newlines stand between the tokens, not behind them."""
        if self.config.newline_layout != GRID:
            return super().video_tokens(video)
        side = self.config.layout.side
        behind = []
        for tokens in video.pooler_output:
            rows = tokens.view(-1, side + 1, tokens.shape[-1])
            behind.append(torch.cat([rows[:, :-1].flatten(0, 1), rows[0, -1:]]))
        videos = super().video_tokens(replace(video, pooler_output=behind))
        return [GridVideoTokens(**vars(tokens) | {"grid": (side, side)}) for tokens in videos]

    def kept_slots(self, merged: MergedVideo, video: VideoTokens, settings: MergingSettings) -> torch.Tensor:
        """
        Overrides CompressingModelMixin.kept_slots: tokens stand in the uncompressed grid, newlines behind its rows,
        those that are left among them.
        """
        if not isinstance(video, GridVideoTokens):
            return super().kept_slots(merged, video, settings)
        row = merged.place // video.grid[1]
        return merged.place + row + (merged.kind == TokenKind.NEWLINE)
