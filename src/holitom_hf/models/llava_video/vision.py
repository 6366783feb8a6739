"""From pixels to features: LLaVA-Video's pooling, and its newlines."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...merging.merged_video import MergedVideo, TokenKind
from ...merging.settings import MergingSettings
from ...merging.video_tokens import VideoTokens
from ...sequence.placeholders import assign_videos
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

    def with_newlines(self, frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
        """Overrides LlavaOnevisionVisionMixin.with_newlines: (F, T, D) and (1, D) to the tokens of a whole video."""
        if self.config.newline_layout != GRID:
            return super().with_newlines(frames, newline)
        rows = frames.unflatten(1, (self.config.layout.side,) * 2)  # (F, H, W, D)
        return torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], dim=2).flatten(0, 2)

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
