"""Heads that are trained along and thrown away: what features and states are asked to tell."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..scenes import COLORS, SHAPES, TEXTURES
from .batches import Batch
from .labels import TRENDS, PatchLabels


class PatchHeads(nn.Module):
    """What a patch's features tell: colour, shape, outline, texture, geometry, and what else is in the frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = [len(COLORS) + 1, len(SHAPES) + 1, len(TEXTURES), 3, len(COLORS) * len(SHAPES), 64]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sum(self.sizes)))

    def forward(self, features: torch.Tensor, labels: list[PatchLabels]) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss over (B, N, dim) features, and accuracies on shapes."""
        stack = {
            name: torch.from_numpy(np.concatenate([getattr(label, name) for label in labels])).to(features.device)
            for name in ("colors", "shapes", "textures", "geometry", "present", "covered")
        }
        colors, shapes, textures, geometry, present, covered = self.head(features).split(self.sizes, -1)
        is_shape = stack["colors"] > 0
        weight = torch.where(is_shape, 1 / is_shape.sum().clamp_min(1), 0.5 / (~is_shape).sum().clamp_min(1))

        def classify(logits, target):
            return (functional.cross_entropy(logits.mT, target, reduction="none") * weight).sum()

        loss = classify(colors, stack["colors"]) + classify(shapes, stack["shapes"])
        loss = loss + 0.5 * functional.cross_entropy(textures.flatten(0, 1), stack["textures"].flatten())
        loss = loss + 5 * functional.smooth_l1_loss(geometry[is_shape], stack["geometry"][is_shape], beta=0.1)
        target = stack["present"][:, None].expand_as(present)
        loss = loss + 3 * functional.binary_cross_entropy_with_logits(present, target)
        parts = functional.binary_cross_entropy_with_logits(covered, stack["covered"], reduction="none").mean(-1)
        loss = loss + 4 * (parts * weight).sum()
        with torch.no_grad():
            metrics = {
                "color": (colors.argmax(-1) == stack["colors"])[is_shape].float().mean().item(),
                "shape": (shapes.argmax(-1) == stack["shapes"])[is_shape].float().mean().item(),
                "texture": (textures.argmax(-1) == stack["textures"]).float().mean().item(),
                "background": (colors.argmax(-1) == 0)[~is_shape].float().mean().item(),
                "distance": (geometry - stack["geometry"])[is_shape][:, :2].norm(dim=-1).mean().item(),
                "present": ((present > 0) == (target > 0.5))[target > 0.5].float().mean().item(),
            }
        return loss, metrics


class TrendHeads(nn.Module):
    """What a decoder's state at a video token tells about the past of what is there."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = [len(TRENDS), 6, 3, len(COLORS) + 1, len(SHAPES) + 1]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sum(self.sizes)))

    def forward(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss over (B, F*N, dim) states."""
        trends = [torch.from_numpy(np.stack(part)).to(states.device).flatten(1) for part in zip(*batch.trends)]
        for name in ("colors", "shapes"):
            trends.append(
                torch.from_numpy(np.stack([getattr(label, name) for label in batch.labels]))
                .to(states.device)
                .flatten(1)
            )
        trend, rank, scene, colors, shapes = trends
        logits = self.head(states).split(self.sizes, -1)
        is_shape = colors > 0

        def classify(part, target, mask):
            mask = mask & (target >= 0)
            return functional.cross_entropy(part[mask], target[mask], reduction="sum") / mask.sum().clamp_min(1)

        everywhere = torch.ones_like(is_shape)
        loss = classify(logits[0], trend, is_shape) + 0.1 * classify(logits[0], trend, ~is_shape)
        loss = (
            loss
            + 0.7 * classify(logits[1], rank.clamp(max=5), is_shape)
            + 0.5 * classify(logits[2], scene, everywhere)
        )
        return loss + 0.3 * (classify(logits[3], colors, is_shape) + classify(logits[4], shapes, is_shape))
