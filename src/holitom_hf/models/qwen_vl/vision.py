"""From flat patches to features of the Qwen-VL families, with what each token receives of the tower's attention."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.utils import output_capturing
from transformers.utils.generic import can_return_tuple
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ...configuration import HoliTomConfig
from ...merging.package import of_package
from ...merging.video_tokens import VideoTokens
from ...sequence.placeholders import assign_videos
from ..vision import HoliTomVideoFeatures, check_finite, chunks_on_device, frames_at_once, joined_chunks
from ..vision_importance import received_attention
from .window_check import check_sees_frame


# In transformers 5.21 lists of hidden states are counted from the first block's output on, not its input.
FIRST_BLOCK = 1 if hasattr(output_capturing, "selected_hidden_states") else 2
encode_changes = of_package("models.qwen_vl.reuse", "encode_changes", "is what vision_reuse_layer needs")


@dataclass
class QwenVideoFeatures(HoliTomVideoFeatures):
    """
    [`HoliTomVideoFeatures`] whose videos have grids of their own: T temporal patches of h x w patches, of which a
    square of `spatial_merge_size` makes one token.

    Attributes:
        pooler_output: A list of V tensors (T_v*h_v*w_v / merge_size^2, D).
        deepstack_features: For each of the tower's layers that have them a list of V tensors, as `pooler_output`.
        computed_patches: As [`HoliTomVideoFeatures`] has it, (T_v, h_v*w_v), row by row.
        grids: A list of V tuples (T, h, w).
    """

    per_video = (*HoliTomVideoFeatures.per_video, "grids")

    deepstack_features: list[list[torch.Tensor]] | None = None
    grids: list[tuple[int, int, int]] | None = None


class QwenVisionMixin:
    """The part of a Qwen-VL model that encodes videos; the method's frames are temporal patches."""

    def check_placeholders(
        self, input_ids: torch.Tensor | None, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None
    ) -> None:
        """
        Raises a `ValueError` if patches, grids and the prompts' placeholders don't fit, before anything is computed.

        Args:
            input_ids: (B, L); with `None` (`inputs_embeds`) they are not looked at.
            pixel_values_videos, video_grid_thw: As in `forward`.
        """
        if torch.compiler.is_compiling():
            return
        if video_grid_thw is None or video_grid_thw.ndim != 2 or video_grid_thw.shape[1] != 3:
            found = None if video_grid_thw is None else tuple(video_grid_thw.shape)
            raise ValueError(f"video_grid_thw must have shape (videos, 3), got {found}")
        merge_size = self.config.vision_config.spatial_merge_size
        num_tokens = []
        for index, (frames, height, width) in enumerate(video_grid_thw.tolist()):
            if frames < 1 or height < 1 or width < 1 or height % merge_size or width % merge_size:
                raise ValueError(
                    f"video {index} has a grid of {frames} x {height} x {width} patches; both sides must be multiples "
                    f"of {merge_size}"
                )
            num_tokens.append(frames * height * width // merge_size**2)
        num_patches = sum(num_tokens) * merge_size**2
        if pixel_values_videos.ndim != 2 or len(pixel_values_videos) != num_patches:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; video_grid_thw is that of "
                f"{num_patches} flat patches"
            )
        if input_ids is not None:
            assign_videos((input_ids == self.config.video_token_id).sum(1).tolist(), num_tokens)

    def video_tokens(self, video: QwenVideoFeatures) -> list[VideoTokens]:
        """Overrides CompressingModelMixin.video_tokens: each with its own grid, and DeepStack's features as maps."""
        if getattr(video, "grids", None) is None:
            raise ValueError("the encoded videos carry no grids: encode them with this model's get_video_features")
        merge_size = self.config.vision_config.spatial_merge_size
        videos = []
        for index, (features, (num_frames, height, width)) in enumerate(zip(video.pooler_output, video.grids)):
            importance, keys = (
                values[index].to(features.device) if values is not None else None
                for values in (video.importance, video.attention_keys)
            )
            maps = tuple(layer[index].unflatten(0, (num_frames, -1)) for layer in video.deepstack_features or ())
            videos.append(
                VideoTokens(
                    features.unflatten(0, (num_frames, -1)),
                    importance,
                    keys,
                    grid=(height // merge_size, width // merge_size),
                    maps=maps,
                )
            )
        return videos

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor | None = None,
        vision_batch_size: int | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        return_vision_states: bool = True,
        **kwargs,
    ) -> QwenVideoFeatures:
        """
        Overrides upstream's get_video_features: temporal patches go through the vision tower in chunks, which changes
        nothing since none sees another, and what each token receives of the attention travels along.

        Args:
            pixel_values_videos: (P, C) flat patches of all videos.
            video_grid_thw: (V, 3), of every video.
            vision_batch_size: Number of temporal patches that go through the tower at once; `None`: all where the
                settings change nothing, else what the device's memory allows.
            holitom_config: Settings the videos will be merged with; default: the model's.
            return_vision_states: `False` leaves out the tower's own outputs, so that none of them outlives its chunk.
            kwargs: As upstream.

        Raises:
            ValueError: If pixels are not finite, `vision_batch_size` is below 1, or the settings ask for importance
                where the last block sees windows alone, or for what a tower can't leave out.
            ImportError: In a checkpoint's own code, if the settings leave patches out.
        """
        settings = self.settings_for(holitom_config)
        if vision_batch_size is not None and vision_batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1 or None, got {vision_batch_size}")
        if settings.needs_importance:
            check_sees_frame(self.visual)
        grids = [tuple(grid) for grid in video_grid_thw.tolist()]
        num_patches = [frames * height * width for frames, height, width in grids]
        check_finite(pixel_values_videos, num_patches, [height * width for _, height, width in grids])
        num_frames = sum(frames for frames, _, _ in grids)
        if vision_batch_size is None:
            vision_batch_size = num_frames if settings.is_identity else self.frames_per_chunk(grids)
        merge_size = self.config.vision_config.spatial_merge_size
        if settings.has_vision_stage:
            videos = list(
                encode_changes(
                    self,
                    pixel_values_videos,
                    grids,
                    settings,
                    vision_batch_size,
                    return_vision_states=return_vision_states,
                    **kwargs,
                )
            )
            importance, keys, computed, rows, _ = (
                [getattr(video, name) for video in videos] for name in HoliTomVideoFeatures.per_video
            )
            if not settings.needs_importance:
                importance = keys = []
            fields = {"computed_patches": computed, "rows_by_layer": rows}
            return joined_features(videos, importance, keys, grids, merge_size, **fields)
        if vision_batch_size >= num_frames:
            parts = [video_grid_thw]
        else:
            frames = video_grid_thw.repeat_interleave(video_grid_thw[:, 0], 0)
            frames = torch.cat([torch.ones_like(frames[:, :1]), frames[:, 1:]], 1)
            parts = frames.split(vision_batch_size)
        sizes = [int(part.prod(1).sum()) for part in parts]

        wanted = kwargs.pop("output_hidden_states", None)
        asked = wanted
        if settings.needs_importance and wanted is not True:
            last = len(self.visual.blocks) - FIRST_BLOCK  # its input, and the last but one that is returned
            asked = [*(wanted if isinstance(wanted, list | tuple) else [wanted] if wanted else []), last]
        outputs, importance, keys = [], [], []
        for chunk, part in zip(chunks_on_device(pixel_values_videos, sizes, self.visual.device), parts):
            part = part.to(chunk.device)
            output = super().get_video_features(
                chunk, part, output_hidden_states=asked, **kwargs | {"return_dict": True}
            )
            outputs.append(output)
            if settings.needs_importance:
                for received, head_mean in block_importance(self.visual, output.hidden_states[-2], part):
                    importance.append(received)
                    keys.append(head_mean)
            if not (wanted and return_vision_states):
                output.hidden_states = None
            if not return_vision_states:
                output.last_hidden_state = output.attentions = None
        return joined_features(outputs, importance, keys, grids, merge_size)

    def frames_per_chunk(self, grids: list[tuple[int, int, int]]) -> int:
        """How many temporal patches the device has the memory for, in chunks of equal size, by the largest."""
        config = self.config.vision_config
        num_patches = max(height * width for _, height, width in grids)
        values = num_patches * (2 * config.intermediate_size + 10 * config.hidden_size)
        if config._attn_implementation == "eager":
            values += 3 * config.num_heads * num_patches**2
        num_frames = sum(frames for frames, _, _ in grids)
        return frames_at_once(num_frames, values * self.visual.dtype.itemsize, self.visual.device)


def joined_features(
    outputs: list,
    importance: list[torch.Tensor],
    keys: list[torch.Tensor],
    grids: list[tuple[int, int, int]],
    merge_size: int,
    **fields,
) -> QwenVideoFeatures:
    """
    What the tower returned for chunks of temporal patches, video by video.

    Args:
        outputs: Upstream's, of every chunk.
        importance, keys: (n, T) and (n, T, K), of consecutive temporal patches; empty where not asked for.
        grids: (T, h, w) of every video.
        merge_size: Side of the square of patches that makes a token.
        fields: What else is known.
    """
    num_tokens = [frames * height * width // merge_size**2 for frames, height, width in grids]

    def by_video(parts) -> list[torch.Tensor]:
        return list(torch.cat(list(parts)).split(num_tokens))

    def by_frame(parts: list[torch.Tensor]) -> list[torch.Tensor] | None:
        frames = [frame for part in parts for frame in part]
        starts = [sum(grid[0] for grid in grids[:v]) for v in range(len(grids))]
        return [torch.stack(frames[s : s + grid[0]]) for s, grid in zip(starts, grids)] if frames else None

    deepstack = [getattr(output, "deepstack_features", None) or [] for output in outputs]
    has_states = outputs[0].last_hidden_state is not None
    return QwenVideoFeatures(
        last_hidden_state=torch.cat([output.last_hidden_state for output in outputs]) if has_states else None,
        hidden_states=joined_chunks([output.hidden_states for output in outputs]),
        attentions=joined_chunks([output.attentions for output in outputs]),
        pooler_output=by_video(video for output in outputs for video in output.pooler_output),
        deepstack_features=[by_video(video for of_chunk in layer for video in of_chunk) for layer in zip(*deepstack)]
        or None,
        importance=by_frame(importance),
        attention_keys=by_frame(keys),
        grids=grids,
        **fields,
    )


def in_reading_order(tower: nn.Module, hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """
    Hidden states of a tower, (P, D), in the order of the patches that went into it: a tower with windows has them
    window by window, squares that make a token together.
    """
    if not hasattr(tower, "window_size"):
        return hidden_states
    window_index, _ = get_vision_window_index(
        grid_thw, tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    order = window_index.argsort().to(hidden_states.device)
    return hidden_states.unflatten(0, (-1, tower.spatial_merge_size**2))[order].flatten(0, 1)


@torch.no_grad()
def block_importance(
    tower: nn.Module, hidden_states: torch.Tensor, grid_thw: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    What each token receives of the attention of a tower's last block, in every temporal patch.

    Softmax attention averaged over heads and queries, of the block's own input, projections and rotary embedding, and
    over the square of patches that makes a token.

    Args:
        tower: Of Qwen2.5-VL, Qwen3-VL or a newer one.
        hidden_states: (P, D), what goes into the block, in the tower's order.
        grid_thw: (V, 3), of the P patches.

    Returns:
        For each of the V: (F, T) float32, and the keys before their rotation, averaged over heads and the square,
        (F, T, head_dim).

    Source: section 3.2; VisionZip, section 3.2, for the keys.
    """
    block, unit = tower.blocks[-1], tower.spatial_merge_size**2
    attention = block.attn
    hidden_states = in_reading_order(tower, hidden_states, grid_thw)
    rows = attention.qkv(block.norm1(hidden_states)).view(len(hidden_states), 3, attention.num_heads, -1)
    queries, keys = rows[:, 0], rows[:, 1]
    angles = tower.rotary_pos_emb(hidden_states, get_vision_position_ids(grid_thw, tower.spatial_merge_size))
    rotated = apply_rotary_pos_emb_vision(queries, keys, *angles)
    grids = grid_thw.tolist()
    num_patches = [frames * height * width for frames, height, width in grids]
    found = []
    for (num_frames, _, _), q, k, plain in zip(grids, *(v.split(num_patches) for v in (*rotated, keys))):
        q, k = (values.unflatten(0, (num_frames, -1)).transpose(1, 2) for values in (q, k))  # (F, H, P, d)
        received = received_attention(q, k, attention.scaling)
        found.append(
            (
                received.unflatten(1, (-1, unit)).mean(2),
                plain.mean(1).unflatten(0, (num_frames, -1, unit)).mean(2),
            )
        )
    return found
