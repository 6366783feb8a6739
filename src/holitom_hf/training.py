"""
Trains the bundled model from nothing on drawn clips: `python -m holitom_hf.training FOLDER`, or on every core
`torchrun --nproc-per-node 2 -m holitom_hf.training FOLDER`.

First the vision tower and the projector learn to tell, at every patch, what is there. Then they are frozen and the
decoder learns to answer; at its middle layer, heads that are thrown away afterwards ask every video token what the
thing under it has done so far. HoliTom takes no part: every video is seen whole. But it is seen in many layouts, with
1 to 32 frames, regular or not, as images, and with positions stretched or squeezed, as large models meet them.
"""

import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed
import typer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from .modeling_holitom import HoliTomLlavaOnevisionForConditionalGeneration
from .processing_holitom import HoliTomProcessor
from .scenes import COLORS, DIRECTIONS, SHAPES, TEXTURES, Clip, random_clip
from .tiny_model import tiny_model, tiny_processor
from .video_questions import NUM_FRAMES, QUESTION_TYPES, Question, ask, draw_set, uniform_times


SIDE, GRID = 112, 14
DENSE_LAYER = 5  # whose output tells, for every video token, what the shape under it has done
TRENDS = ("background", "still", *DIRECTIONS, "larger", "smaller", "collided")
TRAIN_SEEDS = 7  # first number of every training seed; test sets use others (video_questions.SPLITS)


@dataclass
class PatchLabels:
    """
    What is seen at every place of a grid in every frame: `colors`, `shapes`, `textures` (F, N) class indices, 0 for no
    shape; `geometry` (F, N, 3) centre and radius of the shape; `present` (F, K) which colour-shape pairs are in the
    frame; `index` (F, N) the shape's index in the clip, -1 for none; `covered` (F, N, 64) how much of the place's 8x8
    parts shapes cover.
    """

    colors: np.ndarray
    shapes: np.ndarray
    textures: np.ndarray
    geometry: np.ndarray
    present: np.ndarray
    index: np.ndarray
    covered: np.ndarray


def patch_labels(clip: Clip, times: np.ndarray, masks: np.ndarray, grid: int) -> PatchLabels:
    """Labels of a (grid, grid) raster from the shapes' (F, K, side, side) coverage."""
    num_frames, num_shapes, side, _ = masks.shape
    cell = side // grid
    share = (
        masks.reshape(num_frames, num_shapes, grid, cell, grid, cell).mean((3, 5)).reshape(num_frames, num_shapes, -1)
    )
    index = (
        np.where(share.max(1, initial=0) > (0.2 if grid == GRID else 0.1), share.argmax(1), -1)
        if num_shapes
        else (np.full((num_frames, grid * grid), -1))
    )
    colors = np.array([list(COLORS).index(s.color) + 1 for s in clip.shapes] + [0])
    shapes = np.array([SHAPES.index(s.shape) + 1 for s in clip.shapes] + [0])
    places = np.stack([clip.positions(s, times) for s in clip.shapes] + [np.zeros((num_frames, 3))], 1)
    present = np.zeros((num_frames, len(COLORS) * len(SHAPES)), np.float32)
    for number, shape in enumerate(clip.shapes):
        present[shape.is_visible(times), (colors[number] - 1) * len(SHAPES) + shapes[number] - 1] = 1
    part = cell // 8
    parts = (
        masks.max(1, initial=0).reshape(num_frames, grid, 8, part, grid, 8, part).mean((3, 6)).transpose(0, 1, 3, 2, 4)
    )
    textures = np.array([TEXTURES.index(scene.texture) for scene in clip.scenes])[clip.scene_at(times)]
    return PatchLabels(
        colors[index],
        shapes[index],
        np.repeat(textures[:, None], grid * grid, 1),
        np.take_along_axis(places, (index % len(places[0]))[..., None], 1).astype(np.float32),
        present,
        index,
        parts.reshape(num_frames, grid * grid, 64),
    )


def trend_labels(clip: Clip, times: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    What a video's past tells about each place: (F, N) entries of [`TRENDS`], -100 where it is too early to tell; how
    many shapes had come before the one here, -100 for background; the scene's number.
    """
    seen = (
        np.stack([shape.is_visible(times) for shape in clip.shapes])
        if clip.shapes
        else np.zeros((0, len(times)), bool)
    )
    first = [int(row.argmax()) if row.any() else len(times) for row in seen]
    trend = np.zeros((len(times), len(clip.shapes) + 1), int)
    rank = np.full((len(times), len(clip.shapes) + 1), -100)
    for number, shape in enumerate(clip.shapes):
        rank[:, number] = sum(other < first[number] for other in first)
        if any(clip.pan):
            trend[:, number] = -100
            continue
        frames = np.flatnonzero(seen[number])
        places = shape.at(times)
        for order, frame in enumerate(frames):
            dx, dy, _ = places[frame] - places[frames[0]]
            growth = places[frame, 2] / places[frames[0], 2]
            if order == 0:
                label = -100
            elif shape.behavior == "collides":
                gone = np.abs(places[frames[: order + 1], :2] - places[frames[0], :2]).sum(1)
                label = TRENDS.index("collided") if gone[-1] < 0.7 * gone.max() and gone.max() > 0.1 else -100
            elif max(abs(dx), abs(dy)) > 0.08:
                horizontal = abs(dx) > abs(dy)
                word = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
                label = TRENDS.index(word)
            elif growth > 1.2 or growth < 1 / 1.2:
                label = TRENDS.index("larger" if growth > 1 else "smaller")
            else:
                label = -100 if shape.behavior in ("moves", "grows", "shrinks") else TRENDS.index("still")
            trend[frame, number] = label
    frames = np.arange(len(times))[:, None]
    scene = np.repeat(clip.scene_at(times)[:, None], index.shape[1], 1)
    return trend[frames, index], rank[frames, index], scene


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


@dataclass
class Batch:
    """
    Clips in one layout.

    Attributes:
        frames: (B, F, 112, 112, 3) uint8.
        labels: Per clip.
        trends: Per clip, as [`trend_labels`] gives them.
        questions: Per clip, as many for each.
        layout: "video" or "images".
        stretch: Factor on the visual tokens' positions.
    """

    frames: np.ndarray
    labels: list[PatchLabels]
    trends: list[tuple] = field(default_factory=list)
    questions: list[list[Question]] = field(default_factory=list)
    layout: str = "video"
    stretch: float = 1.0


class SingleFrames(IterableDataset):
    """Frames of random clips for the vision tower."""

    def __init__(self, batch_size: int, start: int, rank: int = 0):
        self.batch_size, self.start, self.rank = batch_size, start, rank

    def __iter__(self):
        step = self.start
        while True:
            random = np.random.default_rng((TRAIN_SEEDS, 0, step, self.rank))
            frames, labels = [], []
            for _ in range(self.batch_size // 2):
                clip = random_clip(random)
                times = np.sort(random.uniform(0, 1, 2))
                masks = clip.masks(times, SIDE)
                frames.append(clip.render(times, SIDE, masks))
                labels.append((patch_labels(clip, times, masks, GRID), patch_labels(clip, times, masks, GRID // 2)))
            yield Batch(np.stack(frames), labels)
            step += 1


class QuestionedClips(IterableDataset):
    """Clips with questions; batches hold about as many tokens each, whatever their layout."""

    def __init__(self, start: int, num_steps: int, rank: int = 0, num_tokens: int = 2000, num_questions: int = 6):
        self.start, self.num_steps, self.rank = start, num_steps, rank
        self.num_tokens, self.num_questions = num_tokens, num_questions

    def __iter__(self):
        for step in range(self.start, self.num_steps):
            yield self.draw(step)

    def draw(self, step: int) -> Batch:
        """One batch; few frames at first, then up to 32. All ranks have the same layout and their own clips."""
        random, progress = np.random.default_rng((TRAIN_SEEDS, 1, step)), step / self.num_steps
        layout = "images" if random.random() < 0.06 else "video"
        if layout == "images":
            num_frames = int(random.integers(1, 5))
        else:
            early, late = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
            weights = (0.03, 0.05, 0.05, 0.1, 0.14, 0.2, 0.1, 0.1, 0.18, 0.03, 0.02)
            is_early = random.random() > progress * 5
            num_frames = int(random.choice(early) if is_early else random.choice(late, p=weights))
        size = max(2, round(self.num_tokens / (num_frames * (196 if layout == "images" else 49) + 60)))
        batch = Batch(np.empty(0), [], layout=layout)
        if random.random() < 0.5:
            batch.stretch = float(np.exp(random.uniform(np.log(0.08), np.log(1.5))))
        random = np.random.default_rng((TRAIN_SEEDS, 2, step, self.rank))
        frames = []
        while len(frames) < size:
            clip = random_clip(random)
            times = uniform_times(num_frames)
            if num_frames > 1 and random.random() < 0.4:  # frames dropped at random from a longer clip
                longer = uniform_times(int(num_frames * random.choice((1.25, 1.5, 2))) + 1)
                times = np.sort(random.choice(longer, num_frames, replace=False))
            questions = ask(clip, times, random)
            if len(questions) < 3:
                continue
            # Types that not every clip has come first.
            rare = {"motion": 0.5, "count": 0.5, "change": 0.7, "scene order": 0.6, "appearance order": 0.7}
            questions.sort(key=lambda question: random.random() * rare.get(question.type, 1.0))
            repeats = -(-self.num_questions // len(questions))
            batch.questions.append((questions * repeats)[: self.num_questions])
            masks = clip.masks(times, SIDE)
            frames.append(clip.render(times, SIDE, masks))
            labels = patch_labels(clip, times, masks, GRID if layout == "images" else GRID // 2)
            batch.labels.append(labels)
            batch.trends.append(trend_labels(clip, times, labels.index))
        batch.frames = np.stack(frames)
        return batch


def _loader(dataset: IterableDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4, persistent_workers=True)


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


class Trainer:
    """Both phases, their checkpoints and their log."""

    def __init__(self, folder: Path, vision_steps: int, answer_steps: int, device: str, learning_rate: float = 2e-3):
        self.folder, self.device = Path(folder), torch.device(device)
        is_parallel = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if is_parallel else 0
        self.num_processes = torch.distributed.get_world_size() if is_parallel else 1
        self.vision_steps, self.answer_steps = vision_steps, answer_steps
        self.learning_rate = learning_rate
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.processor: HoliTomProcessor = tiny_processor()
        self.model: HoliTomLlavaOnevisionForConditionalGeneration = tiny_model(self.processor.tokenizer).to(
            self.device
        )
        with torch.no_grad():
            embedding = self.model.model.vision_tower.embeddings.position_embedding.weight
            embedding.copy_(grid_waves(GRID, embedding.shape[1]))
        dim = self.model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({"patch": PatchHeads(dim), "trend": TrendHeads(dim)}).to(self.device)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.phase, self.step, self.seconds = "vision", 0, 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        self.sums, self.num_summed = defaultdict(float), 0

    # What a run needs to go on after it was stopped.

    @property
    def checkpoint(self) -> Path:
        """The file of the run's state."""
        return self.folder / "state.pt"

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        if self.rank:
            return
        state = {name: getattr(self, name) for name in ("phase", "step", "seconds", "average")}
        state |= {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        torch.save(state, self.checkpoint.with_suffix(".part"))
        self.checkpoint.with_suffix(".part").rename(self.checkpoint)

    def load(self) -> None:
        """Goes on where the last run stopped, if there was one."""
        if self.checkpoint.is_file():
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            for name in ("phase", "step", "seconds", "average"):
                setattr(self, name, state[name])
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self._optimizer_state = state["optimizer"]

    def _start(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        decayed = [p for p in parameters if p.ndim > 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": [p for p in parameters if p.ndim < 2]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
        state = self.__dict__.pop("_optimizer_state", None)
        if state is not None:
            self.optimizer.load_state_dict(state)

    def _update(self, loss: torch.Tensor, num_steps: int) -> None:
        """One step: warm-up, constant rate, and a fall over the last third."""
        factor = min(1.0, (self.step + 1) / 100, max(0.02, (num_steps - self.step) / (num_steps / 3)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.num_processes > 1:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            for parameter, mean in zip(
                self.parameters, (flat / self.num_processes).split([p.numel() for p in self.parameters])
            ):
                parameter.grad = mean.view_as(parameter)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        self.step += 1

    def _log(self, every: int, values: dict[str, float]) -> None:
        self.num_summed += 1
        for name, value in values.items():
            if not math.isnan(value):
                self.sums[name] += value
                self.sums["#" + name] += 1
        if self.step % every == 0:
            means = {name: round(self.sums[name] / self.sums["#" + name], 4) for name in values if name in self.sums}
            self.write({"phase": self.phase, "step": self.step, "seconds": round(self.seconds), **means})
            self.sums.clear()

    def write(self, record: dict) -> None:
        """Adds a line to the log."""
        if self.rank:
            return
        line = json.dumps(record)
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(line + "\n")

    def _pixels(self, frames: np.ndarray) -> torch.Tensor:
        """(N, 3, 112, 112) as the processor would make them of frames of this size."""
        video = self.processor.video_processor
        pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (video.image_mean, video.image_std)
        )
        return (pixels - mean) / std

    def _patch_features(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.model.model
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        return model.multi_modal_projector(hidden)

    def train_vision(self) -> None:
        """The first phase."""
        model = self.model.model
        parts = (model.vision_tower, model.multi_modal_projector, self.heads["patch"])
        self._start([p for part in parts for p in part.parameters()])
        for batch in _loader(SingleFrames(64 // self.num_processes, self.step, self.rank)):
            if self.step >= self.vision_steps:
                break
            start = time.perf_counter()
            features = self._patch_features(self._pixels(batch.frames.reshape(-1, SIDE, SIDE, 3)))
            pooled = model.apply_pooling(features)
            fine, _ = self.heads["patch"](features, [labels[0] for labels in batch.labels])
            coarse, metrics = self.heads["patch"](pooled, [labels[1] for labels in batch.labels])
            self._update(fine + coarse, self.vision_steps)
            self.seconds += time.perf_counter() - start
            self._log(50, {"loss": (fine + coarse).item(), **metrics})
            if self.step % 200 == 0:
                self.save()
        self.model.load_state_dict(self.average)
        self.phase, self.step = "answers", 0
        self.save_model()

    def _embed(self, text: str) -> torch.Tensor:
        ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"].to(self.device)
        return self.model.get_input_embeddings()(ids)

    def _prefix(self, batch: Batch) -> tuple[torch.Tensor, slice]:
        """(B, P, dim) what stands before the question, and where the visual tokens are."""
        batch_size, num_frames = batch.frames.shape[:2]
        model = self.model.model
        with torch.no_grad():
            features = self._patch_features(self._pixels(batch.frames.reshape(-1, SIDE, SIDE, 3)))
            features = features if batch.layout == "images" else model.apply_pooling(features)
        features = features.view(batch_size, num_frames, *features.shape[1:])
        newline = model.image_newline.expand(batch_size, 1, -1)
        if batch.layout == "images":
            visual = torch.cat([torch.cat([frame, newline], 1) for frame in features.unbind(1)], 1)
        else:
            visual = torch.cat([features.flatten(1, 2), newline], 1)
        start = self._embed("<|im_start|>user ").expand(batch_size, -1, -1)
        return torch.cat([start, visual], 1), slice(start.shape[1], start.shape[1] + visual.shape[1])

    def answer_logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits at the answers' tokens, these tokens, the question each belongs to, and the visual tokens' states."""
        prefix, visual = self._prefix(batch)
        step = torch.ones(prefix.shape[1], device=self.device)
        step[visual] = batch.stretch
        positions = step.cumsum(0) - 1
        decoder = self.model.model.language_model
        outputs = decoder(
            inputs_embeds=prefix,
            position_ids=positions[None].expand(len(prefix), -1),
            use_cache=True,
            output_hidden_states=True,
        )
        states = outputs.hidden_states[DENSE_LAYER][:, visual]
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(len(batch.questions[0]))

        tokenizer = self.processor.tokenizer
        rows, answers = [], []
        for question in (question for asked in batch.questions for question in asked):
            text = f"\n{question.text}<|im_end|><|im_start|>assistant\n"
            rows.append(tokenizer(text)["input_ids"])
            answers.append(tokenizer(question.answer + "<|im_end|>")["input_ids"])
        length = max(len(row) + len(answer) for row, answer in zip(rows, answers))
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        for number, (row, answer) in enumerate(zip(rows, answers)):
            ids[number, : len(row) + len(answer)] = torch.tensor(row + answer)
            labels[number, len(row) - 1 : len(row) + len(answer) - 1] = torch.tensor(answer)
        ids, labels = ids.to(self.device), labels.to(self.device)
        is_real = torch.cat([ids.new_ones(len(ids), prefix.shape[1]), (ids != tokenizer.pad_token_id).long()], 1)
        hidden = decoder(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            past_key_values=cache,
            attention_mask=is_real,
            position_ids=(positions[-1] + 1 + torch.arange(length, device=self.device))[None].expand(len(ids), -1),
            use_cache=True,
        ).last_hidden_state
        row, column = (labels >= 0).nonzero(as_tuple=True)
        return self.model.lm_head(hidden[row, column]), labels[row, column], row, states

    @torch.no_grad()
    def evaluate(self, num_questions: int = 400) -> dict[str, float]:
        """Accuracy of the averaged weights on clips that are not trained on, by type of question."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        right, asked = defaultdict(int), defaultdict(int)
        times = uniform_times(NUM_FRAMES)
        for clip, questions in draw_set(num_questions, "train", seed=1):
            batch = Batch(clip.render(times, SIDE)[None], [], questions=[questions])
            logits, labels, row, _ = self.answer_logits(batch)
            is_wrong = torch.zeros(len(questions)).index_add_(
                0, row.cpu(), (logits.argmax(-1) != labels).float().cpu()
            )
            for question, wrong in zip(questions, is_wrong.tolist()):
                asked[question.type] += 1
                right[question.type] += wrong == 0
        self.model.load_state_dict(own)
        scores = {kind: round(right[kind] / asked[kind], 3) for kind in QUESTION_TYPES if asked[kind]}
        return {"accuracy": round(sum(right.values()) / sum(asked.values()), 4), **scores}

    def train_answers(self, dense_weight: float = 1.0, evaluate_every: int = 500) -> None:
        """The second phase."""
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(False)
        parts = (self.model, self.heads["trend"])
        self._start([p for part in parts for p in part.parameters() if p.requires_grad])
        for batch in _loader(QuestionedClips(self.step, self.answer_steps, self.rank)):
            start = time.perf_counter()
            logits, labels, _, states = self.answer_logits(batch)
            answer_loss = functional.cross_entropy(logits, labels)
            metrics = {"loss": answer_loss.item(), "right": (logits.argmax(-1) == labels).float().mean().item()}
            loss = answer_loss
            if batch.layout == "video":
                dense = self.heads["trend"](states[:, :-1], batch)
                metrics["dense"] = dense.item()
                loss = loss + dense_weight * dense
            self._update(loss, self.answer_steps)
            self.seconds += time.perf_counter() - start
            self._log(50, metrics)
            if self.step % evaluate_every == 0 and self.rank == 0:
                self.write({"phase": "evaluation", "step": self.step, **self.evaluate()})
            if self.step % 100 == 0:
                self.save()
        if self.rank == 0:
            self.write({"phase": "evaluation", "step": self.step, **self.evaluate(1000)})
        self.save()
        self.save_model()

    def save_model(self) -> None:
        """Writes the averaged weights in bfloat16 with the processor: a checkpoint for `from_pretrained`."""
        if self.rank:
            return
        model = tiny_model(self.processor.tokenizer)
        model.load_state_dict(self.average)
        model.to(torch.bfloat16).save_pretrained(self.folder / "model")
        self.processor.save_pretrained(self.folder / "model")


def main(
    folder: Annotated[Path, typer.Argument(help="For state, log and model; a run that was stopped goes on.")],
    vision_steps: int = 1300,
    answer_steps: int = 4500,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains the bundled model from nothing."""
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    trainer = Trainer(folder, vision_steps, answer_steps, device)
    trainer.load()
    if trainer.phase == "vision":
        trainer.train_vision()
    trainer.train_answers()


if __name__ == "__main__":
    typer.run(main)
