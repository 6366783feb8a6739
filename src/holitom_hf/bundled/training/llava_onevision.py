"""What training LLaVA-OneVision takes beside the recipe: single frames, a projector, newlines."""

import numpy as np
import torch
from torch import nn

from ..tiny_model import tiny_model, tiny_processor
from .batches import Batch
from .labels import GRID, SIDE
from .trainer import Prefix, Trainer


def grid_waves(side: int, dim: int) -> torch.Tensor:
    """
    (side * side, dim) sines and cosines of rows and columns, where learned positions start from: drawn small at
    random they take a thousand steps to become louder than the pixels, and no shape is learned before.
    """
    place = torch.arange(side) / side
    frequency = torch.pi * torch.logspace(-0.3, 0.9, dim // 4)
    waves = torch.cat([(place[:, None] * frequency).sin(), (place[:, None] * frequency).cos()], 1)  # (side, dim / 2)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], -1)
    return 0.7 * grid.flatten(0, 1)


class LlavaOnevisionTrainer(Trainer):
    """Trains the bundled LLaVA-OneVision from nothing."""

    def make(self):
        """Overrides Trainer.make: the tower's positions start as waves."""
        processor = tiny_processor()
        model = tiny_model(processor.tokenizer)
        with torch.no_grad():
            embedding = model.model.vision_tower.embeddings.position_embedding.weight
            embedding.copy_(grid_waves(GRID, embedding.shape[1]))
        return processor, model

    def vision_parts(self) -> list[nn.Module]:
        """Overrides Trainer.vision_parts."""
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    def freeze(self) -> None:
        """Overrides Trainer.freeze: tower and projector."""
        for part in self.vision_parts():
            part.requires_grad_(False)

    def vision_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Overrides Trainer.vision_loss: every patch tells what is there, and every pooled token."""
        features = self.patch_features(self.pixels(batch.frames.reshape(-1, SIDE, SIDE, 3)))
        pooled = self.model.model.apply_pooling(features)
        fine, _ = self.heads["patch"](features, [labels[0] for labels in batch.labels])
        coarse, metrics = self.heads["patch"](pooled, [labels[1] for labels in batch.labels])
        return fine + coarse, metrics

    def projections(self, frames: np.ndarray) -> list[tuple[nn.Linear, torch.Tensor]]:
        """Overrides Trainer.projections."""
        return [(self.model.model.multi_modal_projector.linear_2, self.patch_features(self.pixels(frames)))]

    def prefix(self, batch: Batch) -> Prefix:
        """Overrides Trainer.prefix: frames pooled, one newline, or images with one each; stretched positions."""
        batch_size, num_frames = batch.frames.shape[:2]
        model = self.model.model
        with torch.no_grad():
            features = self.patch_features(self.pixels(batch.frames.reshape(-1, SIDE, SIDE, 3)))
            features = features if batch.layout == "images" else model.apply_pooling(features)
        features = features.view(batch_size, num_frames, *features.shape[1:])
        newline = model.image_newline.expand(batch_size, 1, -1)
        if batch.layout == "images":
            visual = torch.cat([torch.cat([frame, newline], 1) for frame in features.unbind(1)], 1)
        else:
            visual = torch.cat([features.flatten(1, 2), newline], 1)
        start = self.embed("<|im_start|>user ").expand(batch_size, -1, -1)
        index = start.shape[1] + torch.arange(visual.shape[1], device=self.device)
        embeds = torch.cat([start, visual], 1)
        step = torch.ones(embeds.shape[1], device=self.device)
        step[index] = batch.stretch
        return Prefix(embeds, index, (step.cumsum(0) - 1)[None])

    def pixels(self, frames: np.ndarray) -> torch.Tensor:
        """(N, 3, 112, 112) as the processor would make them of frames of this size."""
        video = self.processor.video_processor
        pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (video.image_mean, video.image_std)
        )
        return (pixels - mean) / std

    def patch_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 196, dim) of every patch, projected."""
        model = self.model.model
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        return model.multi_modal_projector(hidden)
