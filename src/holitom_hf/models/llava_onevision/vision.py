"""From pixels to features: the vision tower of LLaVA-OneVision, with what each token receives of its attention."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from ...configuration import HoliTomConfig
from ...merging.package import of_package
from ...merging.patches import PatchPlan
from ...merging.video_tokens import VideoTokens
from ...merging.vision_methods import VisionPlan
from ...sequence.placeholders import assign_videos
from ..siglip import HoliTomSiglipVisionModel
from ..vision import HoliTomVideoFeatures, check_finite, chunks_on_device, frames_at_once, joined_chunks
from ..vision_importance import vision_importance
from ..vision_methods import VISION_ENCODERS


token_groups = of_package("models.token_groups", "token_groups")


class LlavaOnevisionVisionMixin:
    """The part of `LlavaOnevisionModel` that encodes videos."""

    def check_placeholders(self, input_ids: torch.Tensor | None, pixel_values_videos) -> None:
        """
        Raises a `ValueError` if the prompts' video placeholders don't fit the videos, before anything is computed.

        Args:
            input_ids: (B, L); with `None` (`inputs_embeds`) nothing is checked yet.
            pixel_values_videos: As in `forward`.
        """
        for index, frames in enumerate(pixel_values_videos):
            if frames.ndim != 4 or 0 in frames.shape:
                raise ValueError(
                    f"video {index} has shape {tuple(frames.shape)}; expected (frames, channels, height, width)"
                )
        if input_ids is not None and not torch.compiler.is_compiling():
            tokens_per_frame = self.config.tokens_per_frame
            expected = [len(frames) * tokens_per_frame + 1 for frames in pixel_values_videos]
            assign_videos((input_ids == self.config.video_token_id).sum(1).tolist(), expected)

    def video_tokens(self, video: HoliTomVideoFeatures) -> list[VideoTokens]:
        """Overrides CompressingModelMixin.video_tokens: F*T+1 features of a video, the newline last."""
        importance, keys = getattr(video, "importance", None), getattr(video, "attention_keys", None)
        groups = getattr(video, "patch_groups", None)
        videos = []
        for index, tokens in enumerate(video.pooler_output):
            frames = tokens[:-1].view(-1, self.config.tokens_per_frame, tokens.shape[-1])
            videos.append(
                VideoTokens(
                    frames,
                    importance[index].to(frames.device) if importance is not None else None,
                    keys[index].to(frames.device) if importance is not None and keys is not None else None,
                    newline=tokens[-1],
                    groups=None if groups is None else token_groups(self.apply_pooling, groups[index]),
                )
            )
        return videos

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | list[torch.Tensor],
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_batch_size: int | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        return_vision_states: bool = True,
        **kwargs,
    ) -> HoliTomVideoFeatures:
        """
        Overrides LlavaOnevisionModel.get_video_features: videos may differ in their number of frames, frames go
        through the vision tower in chunks, and what each token receives of the attention travels along. Pixels that
        are not yet on the tower's GPU are copied there while the chunk before is encoded.

        Args:
            pixel_values_videos: (V, F, C, H, W), or a list of V tensors (F_v, C, H, W).
            vision_batch_size: Number of frames that go through the vision tower at once; `None`: all where the
                settings change nothing, else what the device's memory allows.
            holitom_config: Settings the videos will be merged with; default: the model's. Importance is left out
                where they don't need it.
            return_vision_states: `False` leaves out the tower's own outputs, so that none of them outlives its chunk.
            kwargs: As upstream. Of `output_hidden_states`, all or by index, the default are those that are projected.
            The rest: as upstream.

        Raises:
            ValueError: If pixels are not finite, or `vision_batch_size` is below 1.
        """
        settings = self.settings_for(holitom_config)
        if vision_batch_size is not None and vision_batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1 or None, got {vision_batch_size}")
        num_frames = [len(frames) for frames in pixel_values_videos]
        is_even = isinstance(pixel_values_videos, torch.Tensor)
        pixels = pixel_values_videos.flatten(0, 1) if is_even else torch.cat(list(pixel_values_videos))
        check_finite(pixels, num_frames)
        if vision_batch_size is None:
            vision_batch_size = len(pixels) if settings.is_identity else self.frames_per_chunk(len(pixels))
        chunks = chunks_on_device(pixels, vision_batch_size, self.vision_tower.device)

        feature_layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        hidden_index, layer = self.importance_layer(feature_layers)
        # No named argument: `generate` gives those to the encoder alone.
        shown = kwargs.pop("output_hidden_states", None) or feature_layers
        shown = shown if isinstance(shown, (list, bool)) else [shown]
        num_leading = int(vision_feature_select_strategy == "default")  # a class before the patches
        asked = _Asked(feature_layers, hidden_index, shown, return_vision_states, num_leading)
        computed = rows_by_layer = groups = None
        if settings.has_vision_stage:
            plan, parts = self._encode_changes(chunks, num_frames, settings, asked, vision_batch_size, **kwargs)
            computed = list(plan.is_computed[:, num_leading:].split(num_frames))
            rows_by_layer = list(plan.rows_by_layer.split(num_frames, dim=1))
            if getattr(plan, "groups", None) is not None:
                groups = list(plan.groups[:, num_leading:].split(num_frames))
        else:
            parts = self._encode_frames(
                chunks,
                asked,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )
        features, importance, keys, states, attentions = [], [], [], [], []
        for part in parts:
            features.append(part.features)
            if return_vision_states:
                states.append(part.states)
                attentions.append(part.attentions)
            if settings.needs_importance:
                received, head_mean = vision_importance(layer, part.hidden_states, part.slot)
                importance.append(self.apply_pooling(received[:, num_leading:, None])[..., 0])
                keys.append(self.apply_pooling(head_mean[:, num_leading:]))

        features = torch.cat([part.flatten(0, -2) for part in features]).view(len(pixels), -1, features[0].shape[-1])
        newline = self.image_newline[None].to(features)
        videos = [torch.cat([frames.flatten(0, 1), newline]) for frames in features.split(num_frames)]
        last_hidden_state, *hidden_states = joined_chunks(states) or [None]
        return HoliTomVideoFeatures(
            last_hidden_state=last_hidden_state,
            hidden_states=tuple(hidden_states) or None,
            attentions=joined_chunks(attentions),
            pooler_output=torch.stack(videos) if is_even else videos,
            importance=list(torch.cat(importance).split(num_frames)) if importance else None,
            attention_keys=list(torch.cat(keys).split(num_frames)) if keys else None,
            computed_patches=computed,
            rows_by_layer=rows_by_layer,
            patch_groups=groups,
        )

    def _encode_frames(self, chunks: Iterable[torch.Tensor], asked: "_Asked", **kwargs) -> Iterator["_EncodedFrames"]:
        """Frames that all go whole through upstream's `get_video_features`, chunk by chunk."""
        for chunk in chunks:
            outputs = super().get_video_features(
                chunk[None],
                output_hidden_states=asked.shown is True
                or [*asked.shown, *asked.feature_layers, asked.importance_index],
                return_dict=True,
                **kwargs,
            )
            yield _EncodedFrames(
                features=outputs.pooler_output[0, :-1],
                hidden_states=outputs.hidden_states[asked.importance_index],
                slot=None,
                states=(outputs.last_hidden_state, *_selected(outputs.hidden_states, asked.shown)),
                attentions=outputs.attentions,
            )

    def _encode_changes(
        self,
        chunks: Iterable[torch.Tensor],
        num_frames: list[int],
        settings: HoliTomConfig,
        asked: "_Asked",
        frames_at_once: int,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[PatchPlan | VisionPlan, Iterator["_EncodedFrames"]]:
        """Frames of which `vision_method` leaves something out, and what is computed."""
        if output_attentions:
            raise ValueError("a tower that leaves patches out has no attentions to return: vision_reuse_layer is set")
        tower = self.vision_tower
        if not isinstance(tower, HoliTomSiglipVisionModel):
            raise ValueError(
                f"vision_reuse_layer needs a SigLIP vision tower, this model's is a {type(tower).__name__}: set None"
            )
        number = len(tower.encoder.layers) + 1
        layers = [index % number for index in asked.feature_layers]
        start, last = settings.vision_reuse_layer, max(layers)
        if start >= last:
            raise ValueError(
                f"vision_reuse_layer is {start}, but features are taken after layer {last} of the vision tower: "
                f"choose 1 to {last - 1}, or None to compute all patches"
            )
        shown = [*range(number)] if asked.shown is True else [index % number for index in asked.shown]
        plan, packed = VISION_ENCODERS[settings.vision_method](
            tower,
            chunks,
            num_frames,
            settings,
            {*layers, asked.importance_index} | ({*shown, number - 1} if asked.has_states else set()),
            frames_at_once,
            shared_from=min(*layers, asked.importance_index),
            interpolate_pos_encoding=interpolate_pos_encoding,
        )

        def parts():
            for part in packed:
                projected = self.multi_modal_projector(torch.cat([part.rows[index] for index in layers], dim=-1))
                states = None
                if asked.has_states:
                    hidden_states = [part.frames(index) if index in shown else None for index in range(number)]
                    states = (tower.post_layernorm(part.frames(number - 1)), *hidden_states)
                yield _EncodedFrames(
                    features=self.apply_pooling(projected[part.slot][:, asked.num_leading :]),
                    hidden_states=part.rows[asked.importance_index],
                    slot=part.slot,
                    states=states,
                )

        return plan, parts()

    def apply_pooling(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Overrides LlavaOnevisionModel.apply_pooling: the same numbers without moving the features to where channels
        come first and back, which torch's interpolation is slow at besides.

        Args:
            image_features: (f, P, D) patches.

        Returns:
            (f, T, D) tokens.
        """
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        frames = image_features.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # channels last, as they lie in memory
        pooled = F.interpolate(frames, size=(math.ceil(side / 2), math.ceil(side / 2)), mode="bilinear")
        return pooled.permute(0, 2, 3, 1).flatten(1, 2)

    def frames_per_chunk(self, num_frames: int) -> int:
        """How many frames the device has the memory for, in chunks of equal size."""
        tower, config = self.vision_tower, self.config.vision_config
        num_patches = (config.image_size // config.patch_size) ** 2
        values = num_patches * (2 * config.intermediate_size + 8 * config.hidden_size)
        if config._attn_implementation == "eager":
            values += 3 * config.num_attention_heads * num_patches**2
        return frames_at_once(num_frames, values * tower.dtype.itemsize, tower.device)

    def importance_layer(self, feature_layers: list[int]) -> tuple[int, nn.Module]:
        """The vision layer whose output feeds the projector (the last if several do), and its input's hidden state."""
        layers = self.vision_tower.encoder.layers
        output_index = max(index % (len(layers) + 1) for index in feature_layers)
        if output_index == 0:
            raise ValueError("vision_feature_layer 0 is the embedding: no attention tells what matters")
        return output_index - 1, layers[output_index - 1]


@dataclass
class _Asked:
    """
    What a call wants of the tower.

    Attributes:
        feature_layers: Hidden states that are projected.
        importance_index: The one that importance is taken from.
        shown: Those that are returned, or all.
        has_states: Whether any are returned.
        num_leading: Places before the patches.
    """

    feature_layers: list[int]
    importance_index: int
    shown: bool | list[int]
    has_states: bool
    num_leading: int


@dataclass
class _EncodedFrames:
    """
    Some frames after the tower.

    Attributes:
        features: (f*T, D) or (f, T, D), projected and pooled.
        hidden_states: What goes into the layer that importance is taken from, (f, P, D), or packed rows (n, D).
        slot: (f, P), the row of every place; `None` where rows are not packed.
        states: The tower's last hidden state, normed, and its hidden states.
        attentions: Of every layer, where asked for.
    """

    features: torch.Tensor
    hidden_states: torch.Tensor
    slot: torch.Tensor | None
    states: tuple[torch.Tensor | None, ...] | None
    attentions: tuple[torch.Tensor, ...] | None = None


def _selected(hidden_states: tuple[torch.Tensor | None, ...], wanted: bool | list[int]) -> list[torch.Tensor | None]:
    """Hidden states with `None` for those that were not asked for, as upstream leaves them out."""
    number = len(hidden_states)
    kept = range(number) if wanted is True else [index % number for index in wanted]
    return [state if index in kept else None for index, state in enumerate(hidden_states)]
