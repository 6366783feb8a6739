"""Where a Qwen model in vLLM adds how far a video's tokens stand behind the first one."""

import torch
from vllm.config import VllmConfig

from .kept_positions import NUM_CHANNELS, from_channels, prompt_positions


class KeptPositionsMixin:
    """
    For a model with positions of three axes, before upstream's class: a video's tokens stand where they stood
    uncompressed. Its encoder hands them on with their offsets as channels, see `kept_positions.py`.

    Raises:
        ValueError: With several stages of a pipeline.
    """

    # Runners leave positions alone; this class adds what a video's tokens need.
    supports_multimodal_pruning = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # Their addresses stay, as graphs of the decoder need it.
        self.offsets, self.shifted = (torch.zeros(3, num_tokens + 1, dtype=torch.long) for _ in range(2))
        self.has_offsets = False
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("positions of kept tokens are known to the first stage of a pipeline alone")

    def positions_of_video(self, tokens: list[int], num_frames: int, longer_side: int) -> int:
        """
        How many positions a video takes before text goes on.

        Args:
            tokens: Of its range in the prompt.
            num_frames: Temporal patches.
            longer_side: Of a frame, in tokens.
        """
        raise NotImplementedError

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """Overrides upstream's get_mrope_input_positions: a video's tokens have the position of its first one."""
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
            offsets = torch.zeros(3, length, dtype=torch.long)
            extent = self.positions_of_video(input_tokens[begin : begin + length], num_frames, max(rows, columns))
            media.append((begin, offsets, extent))
        return prompt_positions(len(input_tokens), media)

    def _postprocess_image_embeds_evs(self, image_embeds_split, image_input) -> tuple[torch.Tensor, ...]:
        """Overrides upstream's _postprocess_image_embeds_evs: positions are known."""
        return tuple(torch.nn.functional.pad(tokens, (0, NUM_CHANNELS)) for tokens in image_embeds_split)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None) -> torch.Tensor:
        """Overrides upstream's embed_input_ids: keeps what `forward` adds to positions."""
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
        """Overrides upstream's forward: a video's tokens stand where they stood uncompressed."""
        num_tokens = positions.shape[-1]
        shifted = torch.add(positions, self.offsets[:, :num_tokens], out=self.shifted[:, :num_tokens])
        return super().forward(input_ids, shifted, intermediate_tensors, inputs_embeds, **kwargs)
