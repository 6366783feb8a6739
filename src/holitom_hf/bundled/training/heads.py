"""Heads that are trained along and thrown away: what features and states are asked to tell."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..scenes import COLORS, SHAPES, TEXTURES
from .batches import Batch
from .labels import TRENDS, PatchLabels, places_of


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
        self.sizes = [len(TRENDS), 6, 3, len(COLORS) + 1, len(SHAPES) + 1, len(TEXTURES), 3]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, sum(self.sizes)))

    def forward(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss over (B, F*N, dim) states."""

        def together(parts) -> torch.Tensor:
            return torch.from_numpy(np.stack(list(parts))).to(states.device).flatten(1, 2)

        trend, rank, scene = (together(part) for part in zip(*batch.trends))
        colors, shapes, textures, geometry = (
            together(getattr(label, name) for label in batch.labels)
            for name in ("colors", "shapes", "textures", "geometry")
        )
        *logits, centers = self.head(states).split(self.sizes, -1)
        is_shape = colors > 0
        everywhere = torch.ones_like(is_shape)

        def classify(part: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask = mask & (target >= 0)
            return functional.cross_entropy(part[mask], target[mask], reduction="sum") / mask.sum().clamp_min(1)

        distance = functional.smooth_l1_loss(centers[is_shape], geometry[is_shape], beta=0.1, reduction="sum")
        return (
            classify(logits[0], trend, is_shape)
            + 0.1 * classify(logits[0], trend, ~is_shape)
            + 0.7 * classify(logits[1], rank.clamp(max=5), is_shape)
            + 0.5 * classify(logits[2], scene, everywhere)
            + 0.3 * classify(logits[3], colors, is_shape)
            + 0.3 * classify(logits[4], shapes, is_shape)
            + 0.3 * classify(logits[5], textures, everywhere)
            + distance / is_shape.sum().clamp_min(1)
        )


class SubjectHeads(nn.Module):
    """What the state of the last token before an answer tells about the one or two things that are asked about."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = [len(COLORS) + 1, len(SHAPES) + 1, len(TRENDS), 6, len(TEXTURES), 3, 3]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * sum(self.sizes)))

    def forward(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss over (Q, dim) states of all questions."""
        rows, classes, geometry = [], [], []
        asked = [(clip, question) for clip, questions in enumerate(batch.questions) for question in questions]
        for number, (clip, question) in enumerate(asked):
            labels = batch.labels[clip]
            places = [places_of(name, question.type, labels) for name in question.about]
            if places and all(place.any() for place in places):
                for slot, (name, place) in enumerate(
                    ((question.about[0], places[0]), (question.about[-1], places[-1]))
                ):
                    rows.append((number, slot))
                    classes.append(_classes_at(place, name in TEXTURES, labels, batch.trends[clip]))
                    geometry.append(labels.geometry[place].mean(0) if name not in TEXTURES else [-1.0] * 3)
        if not rows:
            return states.sum() * 0
        number, slot = torch.tensor(rows, device=states.device).T
        *logits, centers = self.head(states).unflatten(-1, (2, -1))[number, slot].split(self.sizes, -1)
        targets = torch.tensor(np.array(classes), device=states.device)
        loss = sum(
            functional.cross_entropy(part, target, reduction="sum") / (target >= 0).sum().clamp_min(1)
            for part, target in zip(logits, targets.T)
        )
        wanted = torch.tensor(np.array(geometry), dtype=torch.float32, device=states.device)
        distance = functional.smooth_l1_loss(centers, wanted, beta=0.1, reduction="none").mean(-1)
        return loss / len(logits) + 10 * (distance * (wanted[:, 0] >= 0)).mean()


def _classes_at(place: np.ndarray, is_background: bool, labels: PatchLabels, trends: tuple) -> list[int]:
    """Colour, shape, trend, rank, texture, scene at (F, N) places; -100 where it is not known or does not apply."""
    trend, rank, scene = (part[place] for part in trends)
    if is_background:
        return [-100, -100, -100, -100, int(labels.textures[place][0]), int(scene[0])]
    known = trend[trend >= 0]
    return [
        int(labels.colors[place][0]),
        int(labels.shapes[place][0]),
        int(known[-1]) if len(known) else -100,
        int(rank[0].clip(max=5)),
        -100,
        int(scene[0]),
    ]
