"""Both phases of the training, their checkpoints and their log; what is special to a family are hooks."""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import typer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from ...models.upstream import CACHE_NAME, cache_of
from ..questions import NUM_FRAMES, QUESTION_TYPES, draw_set, uniform_times
from ..scenes import random_clip
from .batches import TRAIN_SEEDS, Batch, QuestionedClips, SingleFrames
from .heads import PatchHeads, SubjectHeads, TrendHeads
from .labels import SIDE, places_of


DENSE_LAYER = 4  # layer whose input tells, for every video token, what the shape under it has done
LOOK_LAYER = 4  # layer in which the question's last token looks at the shapes that are asked about
VISUAL_SCALE = 0.1  # standard deviation of visual tokens; text starts from the model's initializer_range
LOOK_WEIGHT = 1.0
SUBJECT_WEIGHT = 1.0
TYPE_WEIGHTS = {"motion": 4.0, "scene order": 3.0, "relation": 2.0, "change": 2.0, "appearance order": 1.5}
SAVE_EVERY = 100  # steps


def _loader(dataset: IterableDataset) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4, persistent_workers=True)


@dataclass
class Prefix:
    """
    What stands before the questions of B clips.

    Attributes:
        embeds: (B, P, dim).
        visual: (V,) which of the P are visual tokens; among them one behind every image, or behind the video, that
            stands for "nothing of it".
        positions: (A, P) on every axis.
        decoder_inputs: Further arguments of the decoder.
    """

    embeds: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    decoder_inputs: dict = field(default_factory=dict)


@dataclass
class Forwarded:
    """
    What a batch of B clips with Q questions in all gives.

    Attributes:
        logits: (T, vocabulary) at the T tokens before those of the answers.
        labels: (T,) the answers' tokens.
        row: (T,) the question each belongs to.
        dense: (B, V, dim) states of the visual tokens, as in [`Prefix`], before DENSE_LAYER.
        seen, seen_positions: The same before LOOK_LAYER, and (A, V) their positions.
        asking, asking_positions: (Q, dim) states of the last tokens before the answers there, (A, Q) their positions.
        found: (Q, dim) their states after it.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor
    dense: torch.Tensor
    seen: torch.Tensor
    seen_positions: torch.Tensor
    asking: torch.Tensor
    asking_positions: torch.Tensor
    found: torch.Tensor

    @property
    def is_wrong(self) -> torch.Tensor:
        """(T,) 1.0 where a token is not the most likely one."""
        return (self.logits.argmax(-1) != self.labels).float()


def _along_tokens(places: np.ndarray, layout: str, num_tokens: int) -> np.ndarray:
    """(V,) from (F, N) bool: what stands behind every image, or behind the video, is not among them."""
    if layout == "images":
        places = np.pad(places, ((0, 0), (0, 1)))
    return np.pad(places.flatten(), (0, num_tokens - places.size))


class Trainer:
    """
    Both phases, their checkpoints and their log.

    What is special to a family are these hooks: [`make`], [`vision_parts`], [`vision_loss`], [`projections`],
    [`freeze`], [`prefix`], [`frames`], [`clips`] and the text around a question.

    Attributes:
        question: Text of a question and what stands behind it, to be formatted with `text`.
    """

    question = "\n{text}<|im_end|><|im_start|>assistant\n"

    def make(self):
        """The processor, and a model of its own with random weights."""
        raise NotImplementedError

    def vision_parts(self) -> list[nn.Module]:
        """What learns in the first phase."""
        raise NotImplementedError

    def vision_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """What the first phase makes smaller, and figures for the log."""
        raise NotImplementedError

    def projections(self, frames: np.ndarray) -> list[tuple[nn.Linear, torch.Tensor]]:
        """The last maps before the decoder, and what they make of (F, 112, 112, 3) frames."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Takes from the second phase what the first has taught."""
        raise NotImplementedError

    def prefix(self, batch: Batch) -> Prefix:
        """What stands before the questions of a batch."""
        raise NotImplementedError

    def frames(self) -> SingleFrames:
        """The dataset of the first phase, from this step on."""
        return SingleFrames(64 // self.num_processes, self.step, self.rank)

    def clips(self) -> QuestionedClips:
        """The dataset of the second phase, from this step on."""
        return QuestionedClips(self.step, self.answer_steps, self.rank)

    def __init__(
        self,
        folder: Path,
        vision_steps: int,
        answer_steps: int,
        device: str,
        learning_rate: float = 2e-3,
        answer_learning_rate: float = 1.5e-3,
    ):
        self.folder, self.device = Path(folder), torch.device(device)
        is_parallel = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if is_parallel else 0
        self.num_processes = torch.distributed.get_world_size() if is_parallel else 1
        self.vision_steps, self.answer_steps = vision_steps, answer_steps
        self.learning_rates = {"vision": learning_rate, "answers": answer_learning_rate}
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.processor, self.model = self.make()
        self.model.to(self.device)
        dim = self.model.config.text_config.hidden_size
        self.heads = nn.ModuleDict(
            {"patch": PatchHeads(dim), "trend": TrendHeads(dim), "subject": SubjectHeads(dim)}
        ).to(self.device)
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
        state["optimizer"] = None if self.optimizer is None else self.optimizer.state_dict()
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
        """One step: warm-up, constant rate, and a fall over the last fifth."""
        factor = min(1.0, (self.step + 1) / 100, max(0.02, (num_steps - self.step) / (num_steps / 5)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rates[self.phase] * factor
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
        typer.echo(line)
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(line + "\n")

    def train_vision(self, stop_at: int | None = None) -> None:
        """The first phase, or as much of it as lies before step `stop_at`."""
        parts = [*self.vision_parts(), self.heads["patch"]]
        self._start([p for part in parts for p in part.parameters()])
        for batch in _loader(self.frames()):
            if self.step == stop_at:
                return
            if self.step >= self.vision_steps:
                break
            start = time.perf_counter()
            loss, metrics = self.vision_loss(batch)
            self._update(loss, self.vision_steps)
            self.seconds += time.perf_counter() - start
            self._log(50, {"loss": loss.item(), **metrics})
            if self.step % SAVE_EVERY == 0:
                self.save()
        self.model.load_state_dict(self.average)
        self.match_scales()
        self.phase, self.step, self.optimizer = "answers", 0, None
        self.save()
        self.save_model()

    @torch.no_grad()
    def match_scales(self) -> None:
        """
        Scales what goes into the decoder to the size of its embeddings. Much larger, the decoder's layers would add
        nothing to it that is heard, for as long as their weights are small.
        """
        random = np.random.default_rng((TRAIN_SEEDS, 3))
        frames = np.concatenate([random_clip(random).render(uniform_times(2), SIDE) for _ in range(16)])
        for projection, features in self.projections(frames):
            for parameter in projection.parameters():
                parameter.mul_(VISUAL_SCALE / features.std())
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def embed(self, text: str) -> torch.Tensor:
        """(1, L, dim) of a text's tokens."""
        ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"].to(self.device)
        return self.model.get_input_embeddings()(ids)

    def decoder_positions(self, positions: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Positions (A, L) as the decoder takes them for some rows that are alike."""
        positions = positions[:, None].expand(-1, batch_size, -1)
        return positions[0] if len(positions) == 1 else positions

    def answer_logits(self, batch: Batch) -> "Forwarded":
        """Runs a batch: every clip once, its questions behind it, each as if it were the only one."""
        prefix = self.prefix(batch)
        visual, positions, length = prefix.visual, prefix.positions, prefix.embeds.shape[1]
        decoder = self.model.model.language_model
        outputs = decoder(
            inputs_embeds=prefix.embeds,
            position_ids=self.decoder_positions(positions, len(prefix.embeds)),
            use_cache=True,
            output_hidden_states=True,
            **prefix.decoder_inputs,
        )
        cache = cache_of(outputs)
        cache.batch_repeat_interleave(len(batch.questions[0]))

        tokenizer = self.processor.tokenizer
        rows, answers = [], []
        for question in (question for asked in batch.questions for question in asked):
            rows.append(tokenizer(self.question.format(text=question.text))["input_ids"])
            answers.append(tokenizer(question.answer + "<|im_end|>")["input_ids"])
        num_new = max(len(row) + len(answer) for row, answer in zip(rows, answers))
        ids = torch.full((len(rows), num_new), tokenizer.pad_token_id)
        labels = torch.full((len(rows), num_new), -100)
        for number, (row, answer) in enumerate(zip(rows, answers)):
            ids[number, : len(row) + len(answer)] = torch.tensor(row + answer)
            labels[number, len(row) - 1 : len(row) + len(answer) - 1] = torch.tensor(answer)
        ids, labels = ids.to(self.device), labels.to(self.device)
        later = positions[:, -1:] + 1 + torch.arange(num_new, device=self.device)
        is_real = torch.cat([ids.new_ones(len(ids), length), (ids != tokenizer.pad_token_id).long()], 1)
        answered = decoder(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=is_real,
            position_ids=self.decoder_positions(later, len(ids)),
            use_cache=True,
            output_hidden_states=True,
            **{CACHE_NAME: cache},
        )
        row, column = (labels >= 0).nonzero(as_tuple=True)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        return Forwarded(
            logits=self.model.lm_head(answered.last_hidden_state[row, column]),
            labels=labels[row, column],
            row=row,
            dense=outputs.hidden_states[DENSE_LAYER][:, visual],
            seen=outputs.hidden_states[LOOK_LAYER][:, visual],
            seen_positions=positions[:, visual],
            asking=answered.hidden_states[LOOK_LAYER][torch.arange(len(rows)), last],
            asking_positions=later[:, last],
            found=answered.hidden_states[LOOK_LAYER + 1][torch.arange(len(rows)), last],
        )

    def answer_loss(self, batch: Batch, forwarded: "Forwarded") -> torch.Tensor:
        """Cross-entropy of the answers; hard and rare types weigh more, the end of an answer less."""
        asked = [question for questions in batch.questions for question in questions]
        weight = torch.tensor([TYPE_WEIGHTS.get(question.type, 1.0) for question in asked], device=self.device)
        weight = weight[forwarded.row]
        weight = torch.where(forwarded.labels == self.processor.tokenizer.eos_token_id, 0.2 * weight, weight)
        losses = functional.cross_entropy(forwarded.logits, forwarded.labels, reduction="none")
        return (losses * weight).sum() / weight.sum()

    def look_loss(self, batch: Batch, forwarded: "Forwarded") -> torch.Tensor:
        """How far the heads of the last token before an answer look away from what is asked about."""
        decoder = self.model.model.language_model
        layer = decoder.layers[LOOK_LAYER]
        queries = decoder.query_of(layer.self_attn, layer.input_layernorm(forwarded.asking)[None])[0]  # (H, B*Q, d)
        keys = decoder.keys_of(layer.self_attn, layer.input_layernorm(forwarded.seen))  # (B, H_kv, V, d)
        num_heads, head_dim = queries.shape[0], queries.shape[-1]

        def turn(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            cos, sin = (part[0] for part in decoder.rotary_emb(values, self.decoder_positions(positions.float(), 1)))
            return values * cos + rotate_half(values) * sin

        queries = turn(queries, forwarded.asking_positions).transpose(0, 1).unflatten(0, (len(keys), -1))
        keys = turn(keys, forwarded.seen_positions).transpose(1, 2)
        keys = keys.repeat_interleave(num_heads // keys.shape[2], 2)  # (B, V, H, d)
        scores = torch.einsum("bqhd,bvhd->bqhv", queries, keys) / math.sqrt(head_dim)
        log_share = scores.log_softmax(-1)  # (B, Q, H, V)
        targets, rows = [], []
        for clip, (labels, asked) in enumerate(zip(batch.labels, batch.questions)):
            for number, question in enumerate(asked):
                wanted = [places_of(name, question.type, labels) for name in question.about]
                if wanted and all(places.any() for places in wanted):  # half of the heads for each of two things
                    ends = (wanted[0], wanted[-1])
                    targets.append(np.stack([_along_tokens(places, batch.layout, keys.shape[1]) for places in ends]))
                    rows.append((clip, number))
                elif question.type == "existence" and not wanted:  # nothing to look at: what stands behind
                    targets.append(np.arange(keys.shape[1])[None].repeat(2, 0) == keys.shape[1] - 1)
                    rows.append((clip, number))
        if not rows:
            return scores.sum() * 0
        clips, numbers = torch.tensor(rows, device=self.device).T
        is_target = torch.from_numpy(np.stack(targets)).to(self.device)  # (T, 2, V)
        is_target = is_target.repeat_interleave(num_heads // 2, 1)
        chosen = log_share[clips, numbers].masked_fill(~is_target, -torch.inf)
        return -chosen.logsumexp(-1).mean()

    @torch.no_grad()
    def evaluate(self, num_questions: int = 400) -> dict[str, float]:
        """Accuracy of the averaged weights on clips that are not trained on, by type of question."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        right, asked = defaultdict(int), defaultdict(int)
        times = uniform_times(NUM_FRAMES)
        for clip, questions in draw_set(num_questions, "train", seed=1):
            batch = Batch(clip.render(times, SIDE)[None], [], questions=[questions])
            run = self.answer_logits(batch)
            is_wrong = torch.zeros(len(questions)).index_add_(0, run.row.cpu(), run.is_wrong.cpu())
            for question, wrong in zip(questions, is_wrong.tolist()):
                asked[question.type] += 1
                right[question.type] += wrong == 0
        self.model.load_state_dict(own)
        scores = {kind: round(right[kind] / asked[kind], 3) for kind in QUESTION_TYPES if asked[kind]}
        return {"accuracy": round(sum(right.values()) / sum(asked.values()), 4), **scores}

    def train_answers(self, stop_at: int | None = None, dense_weight: float = 1.0, evaluate_every: int = 500) -> None:
        """The second phase, or as much of it as lies before step `stop_at`."""
        self.freeze()
        parts = (self.model, self.heads["trend"], self.heads["subject"])
        self._start([p for part in parts for p in part.parameters() if p.requires_grad])
        for batch in _loader(self.clips()):
            if self.step == stop_at:
                return
            start = time.perf_counter()
            run = self.answer_logits(batch)
            answer_loss, look_loss = self.answer_loss(batch, run), self.look_loss(batch, run)
            metrics = {"loss": answer_loss.item(), "right": 1 - run.is_wrong.mean().item(), "look": look_loss.item()}
            subject_loss = self.heads["subject"](run.found, batch)
            metrics["subject"] = subject_loss.item()
            loss = answer_loss + LOOK_WEIGHT * look_loss + SUBJECT_WEIGHT * subject_loss
            if batch.layout == "video":
                dense = self.heads["trend"](run.dense[:, :-1], batch)
                metrics["dense"] = dense.item()
                loss = loss + dense_weight * dense
            self._update(loss, self.answer_steps)
            self.seconds += time.perf_counter() - start
            self._log(50, metrics)
            if self.step % evaluate_every == 0 and self.rank == 0:
                self.write({"phase": "evaluation", "step": self.step, **self.evaluate()})
            if self.step % SAVE_EVERY == 0:
                self.save()
        if self.rank == 0:
            self.write({"phase": "evaluation", "step": self.step, **self.evaluate(1000)})
        self.save()
        self.save_model()

    def save_model(self) -> None:
        """Writes the averaged weights in bfloat16 with the processor: a checkpoint for `from_pretrained`."""
        if self.rank:
            return
        _, model = self.make()
        model.load_state_dict(self.average)
        model.to(torch.bfloat16).save_pretrained(self.folder / "model")
        self.processor.save_pretrained(self.folder / "model")
