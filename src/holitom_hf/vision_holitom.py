"""From pixels to features: the vision tower of LLaVA-OneVision, with what each token receives of its attention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_holitom import HoliTomConfig
from .video_placeholders import assign_videos
from .vision_importance import vision_importance


# Bytes that a chunk of frames may take in the vision tower where the device's memory can't be asked for.
CHUNK_BYTES = 2 * 2**30
# Share of a GPU's free memory that it may take.
CHUNK_SHARE = 0.25


@dataclass
class HoliTomVideoFeatures(BaseModelOutputWithPooling):
    """
    Videos after vision tower, projector and pooling, at full length, with what merging needs to know.

    Attributes:
        pooler_output: (V, F*T+1, D) features of V videos, the newline last; a list of (F_v*T+1, D) if their numbers
            of frames differ.
        importance: A list of V tensors (F_v, T), float32: what each token receives of the attention.
        keys: A list of V tensors (F_v, T, K): the attention's keys, averaged over heads.
    """

    importance: list[torch.Tensor] | None = None
    keys: list[torch.Tensor] | None = None


class HoliTomVisionMixin:
    """The part of `LlavaOnevisionModel` that encodes videos."""

    def _tokens_per_frame(self) -> int:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return (-(-side // 2)) ** 2

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
        if input_ids is not None:
            tokens_per_frame = self._tokens_per_frame()
            expected = [len(frames) * tokens_per_frame + 1 for frames in pixel_values_videos]
            assign_videos((input_ids == self.config.video_token_id).sum(1).tolist(), expected)

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | list[torch.Tensor],
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_batch_size: int | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
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
            The rest: as upstream.

        Raises:
            ValueError: If pixels are not finite, or `vision_batch_size` is below 1.
        """
        settings = self.config.holitom_config if holitom_config is None else HoliTomConfig.coerce(holitom_config)
        if vision_batch_size is not None and vision_batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1 or None, got {vision_batch_size}")
        num_frames = [len(frames) for frames in pixel_values_videos]
        is_even = isinstance(pixel_values_videos, torch.Tensor)
        pixels = pixel_values_videos.flatten(0, 1) if is_even else torch.cat(list(pixel_values_videos))
        self._check_finite(pixels, num_frames)

        feature_layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        hidden_index, layer = self._importance_layer(feature_layers)
        features, importance, keys = [], [], []
        if vision_batch_size is None:
            vision_batch_size = len(pixels) if settings.is_identity else self._frames_at_once(len(pixels))
        for chunk in chunks_on_device(pixels, vision_batch_size, self.vision_tower.device):
            outputs = super().get_video_features(
                chunk[None],
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                output_hidden_states=[*feature_layers, hidden_index],
                return_dict=True,
                **kwargs,
            )
            features.append(outputs.pooler_output[0, :-1])
            if settings.has_outer_stage:
                received, head_mean = vision_importance(layer, outputs.hidden_states[hidden_index])
                if vision_feature_select_strategy == "default":
                    received, head_mean = received[:, 1:], head_mean[:, 1:]
                importance.append(self.apply_pooling(received[..., None])[..., 0])
                keys.append(self.apply_pooling(head_mean))

        features = torch.cat(features).view(len(pixels), -1, features[0].shape[-1])
        newline = self.image_newline[None].to(features)
        videos = [torch.cat([frames.flatten(0, 1), newline]) for frames in features.split(num_frames)]
        return HoliTomVideoFeatures(
            pooler_output=torch.stack(videos) if is_even else videos,
            importance=list(torch.cat(importance).split(num_frames)) if importance else None,
            keys=list(torch.cat(keys).split(num_frames)) if keys else None,
        )

    def _frames_at_once(self, num_frames: int) -> int:
        """How many frames the device has the memory for, in chunks of equal size."""
        tower, config = self.vision_tower, self.config.vision_config
        num_patches = (config.image_size // config.patch_size) ** 2
        values = num_patches * (2 * config.intermediate_size + 8 * config.hidden_size)
        if config._attn_implementation == "eager":
            values += 3 * config.num_attention_heads * num_patches**2
        budget = CHUNK_BYTES
        if tower.device.type == "cuda":
            unused = torch.cuda.memory_reserved(tower.device) - torch.cuda.memory_allocated(tower.device)
            budget = CHUNK_SHARE * (torch.cuda.mem_get_info(tower.device)[0] + unused)
        most = max(1, int(budget // (values * tower.dtype.itemsize)))
        num_chunks = -(-num_frames // most)
        return -(-num_frames // num_chunks)

    def _importance_layer(self, feature_layers: list[int]) -> tuple[int, nn.Module]:
        """The vision layer whose output feeds the projector (the last if several do), and its input's hidden state."""
        layers = self.vision_tower.encoder.layers
        output_index = max(index % (len(layers) + 1) for index in feature_layers)
        if output_index == 0:
            raise ValueError("vision_feature_layer 0 is the embedding: no attention tells what matters")
        return output_index - 1, layers[output_index - 1]

    @staticmethod
    def _check_finite(pixels: torch.Tensor, num_frames: list[int]) -> None:
        # A sum is one pass without copies, and finite only if all are; that it is not may be an overflow.
        if pixels.flatten(1).sum(1, dtype=torch.float32).isfinite().all():
            return
        is_finite = torch.isfinite(pixels.flatten(1)).all(1)
        if not is_finite.all():
            frame = int(is_finite.logical_not().nonzero()[0])
            video = next(v for v in range(len(num_frames)) if frame < sum(num_frames[: v + 1]))
            raise ValueError(
                f"video {video} has NaN or infinite pixels in frame {frame - sum(num_frames[:video])}: check how it "
                "was decoded and normalized"
            )


def chunks_on_device(pixels: torch.Tensor, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """
    Frames chunk by chunk on the vision tower's device; the next chunk is on its way while one is used.

    Args:
        pixels: (F, C, H, W), anywhere.
        size: Number of frames in a chunk.
        device: Where they are needed. Offloaded weights lie on no device that counts: frames stay where they are.
    """
    chunks = pixels.split(size)
    if device.type != "cuda" or pixels.device == device:
        yield from (chunk if device.type == "meta" else chunk.to(device) for chunk in chunks)
        return
    copies = torch.cuda.Stream(device)

    def send(chunk: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(copies):
            return (chunk.pin_memory() if chunk.device.type == "cpu" else chunk).to(device, non_blocking=True)

    following = send(chunks[0])
    for number in range(1, len(chunks) + 1):
        current, user = following, torch.cuda.current_stream(device)
        user.wait_stream(copies)
        current.record_stream(user)
        if number < len(chunks):
            following = send(chunks[number])
        yield current
