"""
Trains a side network on stored activations of the frozen, compressed decoder (parallel adapters and activation cache
of Pluto and Charon, arXiv 2408.10746): the decoder runs once for every clip, before the epochs, and never again; no
gradient goes through it. What is learned is a kind of question that the bundled model was not trained on: how many
backgrounds a drawn clip has.

    python examples/side_network.py [--clips 200] [--epochs 12] [--retention-ratio 0.15]
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import logging

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import NUM_FRAMES, SPLITS, uniform_times
from holitom_hf.bundled.scenes import random_clip
from holitom_hf.evaluation.statistics import mcnemar_probability


QUESTION, ANSWERS = "How many backgrounds are there?", ("one", "two", "three")
SIDE, SEED = 112, 5
UNCOMPRESSED = {"outer_method": "none", "inner_method": "none"}


def clips(split: str, number: int):
    """Drawn videos (F, H, W, 3) and how many scenes each has, less one: as many of each number."""
    seed = 0
    for index in range(number):
        while True:
            random = np.random.default_rng((SPLITS[split], SEED, seed))
            clip, seed = random_clip(random, held_out=split != "train"), seed + 1
            if len(clip.scenes) == 1 + index % len(ANSWERS):
                break
        yield clip.render(uniform_times(NUM_FRAMES), SIDE), index % len(ANSWERS)


@dataclass
class Activations:
    """
    What is stored of a clip's prompt, and all that later epochs need.

    Attributes:
        layers: Of every decoder layer its output, (N, D) before stage 3 and (M, D) from it on, bfloat16.
        last: (D,) bfloat16, what the head gets for the prompt's last token.
        keep: (M,) int64, which of the N tokens stage 3 left.
        answer: Number of the right answer.
    """

    layers: list[torch.Tensor]
    last: torch.Tensor
    keep: torch.Tensor
    answer: int

    @property
    def num_bytes(self) -> int:
        stored = (*self.layers, self.last, self.keep)
        return sum(values.numel() * values.element_size() for values in stored)


class FrozenDecoder:
    """
    The bundled model, whose activations are stored.

    Attributes:
        num_runs: How often its decoder ran.
    """

    def __init__(self, retention_ratio: float):
        self.processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
        self.model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
        self.model.requires_grad_(False).eval()
        self.model.config.holitom_config.retention_ratio = retention_ratio
        content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
        self.prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        firsts = [self.processor.tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
        self.first_tokens, self.num_runs = torch.tensor(firsts), 0
        self.model.model.language_model.register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.num_runs += 1

    @torch.no_grad()
    def activations(self, video: np.ndarray, answer: int, settings: dict | None = None) -> Activations:
        """What the decoder computes for a clip's prompt."""
        inputs = self.processor(text=self.prompt, videos=video, return_tensors="pt")
        outputs = self.model.model(**inputs, holitom_config=settings, output_hidden_states=True, use_cache=False)
        # The first is what goes in; in place of the last layer's output stands what the head gets.
        *layers, last = (states[0].bfloat16() for states in outputs.hidden_states[1:])
        keep = outputs.get("inner_keep")
        return Activations([*layers, last], last[-1], torch.arange(len(last)) if keep is None else keep[0], answer)


class SideLayer(nn.Module):
    """A small transformer layer beside one of the decoder's: it mixes that one's output into its own state."""

    def __init__(self, dim: int, width: int, num_heads: int = 2):
        super().__init__()
        self.down = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, width))
        self.norm, self.num_heads = nn.RMSNorm(width), num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, state: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """State (B, N, W), the decoder layer's output (B, N, D) and a mask (B, 1, N, N) to the next state."""
        state = state + self.down(hidden)
        heads = self.qkv(self.norm(state)).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask)  # (B, heads, N, W / heads)
        state = state + self.out(mixed.transpose(1, 2).flatten(2))
        return state + self.mlp(state)


class SideNetwork(nn.Module):
    """A side layer for each of the decoder's. In the beginning it adds nothing."""

    def __init__(self, num_layers: int, dim: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(SideLayer(dim, width) for _ in range(num_layers))
        self.up = nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, batch: list[Activations]) -> torch.Tensor:
        """(B, D), what is added to the prompt's last token before the head."""
        state, mask = 0.0, None
        for number, layer in enumerate(self.layers):
            hidden, is_real = padded([clip.layers[number] for clip in batch])
            if mask is not None and hidden.shape[1] != mask.shape[-1]:  # behind stage 3
                rows = [row[len(row) - len(clip.layers[0]) :][clip.keep] for row, clip in zip(state, batch)]
                state, mask = padded(rows)[0], None
            if mask is None:
                mask = (is_real[:, None] & torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool())[:, None]
                mask = mask | torch.eye(hidden.shape[1]).bool()  # padding sees itself
            state = layer(state, hidden, mask)
        return self.up(state[:, -1])


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (N_b, D) as float32 (B, N, D), padded at the left, and which of it is real, (B, N) bool."""
    longest = max(map(len, rows))
    is_real = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
    return torch.stack([F.pad(row.float(), (0, 0, longest - len(row), 0)) for row in rows]), is_real


def logits_of(side: SideNetwork | None, head: nn.Module, batch: list[Activations]) -> torch.Tensor:
    """(B, vocabulary) of the answers' first token; without a side network the frozen model's own."""
    last = torch.stack([clip.last for clip in batch]).float()
    return head(last if side is None else last + side(batch))


@torch.no_grad()
def tested(side, head, stored: list[Activations], first_tokens: torch.Tensor) -> tuple[float, list[bool]]:
    """Loss, and which answers are right, of the whole vocabulary."""
    logits = torch.cat([logits_of(side, head, stored[i : i + 32]) for i in range(0, len(stored), 32)])
    right = first_tokens[[clip.answer for clip in stored]]
    return float(F.cross_entropy(logits, right)), (logits.argmax(-1) == right).tolist()


def interval(right: list[bool]) -> str:
    """Share of right answers with Wilson's 95% interval."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{p:.0%} [{low:.0%}, {high:.0%}] of {n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clips", type=int, default=200, help="to train on; half as many for validation and test each"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=32, help="of the side network")
    parser.add_argument("--retention-ratio", type=float, default=0.15)
    parser.add_argument("--num-uncompressed", type=int, default=8, help="clips stored without compression to compare")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)

    frozen = FrozenDecoder(options.retention_ratio)
    head, text_config = frozen.model.lm_head, frozen.model.config.text_config
    numbers = {"train": options.clips, "validation": options.clips // 2, "test": options.clips // 2}
    stored = {split: [frozen.activations(*clip) for clip in clips(split, number)] for split, number in numbers.items()}
    num_clips, num_runs = sum(map(len, stored.values())), frozen.num_runs
    print(f"{num_clips} clips, stored in {num_runs} runs of the decoder", flush=True)
    few = stored["train"][: options.num_uncompressed]
    whole = [frozen.activations(*clip, UNCOMPRESSED).num_bytes for clip, _ in zip(clips("train", options.clips), few)]
    with_it = sum(clip.num_bytes for clip in few)
    print(f"bytes of {len(few)} of them: {with_it} compressed, {sum(whole)} not: {with_it / sum(whole):.1%}")
    print(f"bytes of all, compressed: {sum(clip.num_bytes for split in stored.values() for clip in split)}")

    side = SideNetwork(text_config.num_hidden_layers, text_config.hidden_size, options.width)
    num_parameters = sum(weight.numel() for weight in side.parameters())
    print(f"the side network has {num_parameters} parameters", flush=True)
    steps = options.epochs * math.ceil(options.clips / options.batch_size)
    optimizer = torch.optim.AdamW(side.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    runs_before = frozen.num_runs
    best, chosen, state = math.inf, 0, side.state_dict()
    for epoch in range(options.epochs + 1):
        total = 0.0
        if epoch:
            for batch in torch.randperm(options.clips).split(options.batch_size):
                some = [stored["train"][i] for i in batch.tolist()]
                right = frozen.first_tokens[[clip.answer for clip in some]]
                loss = F.cross_entropy(logits_of(side, head, some), right)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(some) / options.clips
        else:
            total, _ = tested(side, head, stored["train"], frozen.first_tokens)
        validation, right = tested(side, head, stored["validation"], frozen.first_tokens)
        if validation < best:
            best, chosen = validation, epoch
            state = {name: values.clone() for name, values in side.state_dict().items()}
        print(f"epoch {epoch}: loss {total:.3f}, validation {validation:.3f}, {interval(right)}", flush=True)
    side.load_state_dict(state)
    assert frozen.num_runs == runs_before
    assert all(weight.grad is None for weight in frozen.model.parameters())
    print(f"epochs ran the decoder {frozen.num_runs - runs_before} times; no weight of it has a gradient")

    _, before = tested(None, head, stored["test"], frozen.first_tokens)
    _, after = tested(side, head, stored["test"], frozen.first_tokens)
    won, lost = (sum(a > b for a, b in pairs) for pairs in (zip(after, before), zip(before, after)))
    probability = mcnemar_probability(won, lost)
    print(f"test, frozen: {interval(before)}; chance {1 / len(ANSWERS):.0%}")
    print(f"test, with the side network of epoch {chosen}, the best in validation loss: {interval(after)}")
    print(f"+{won} -{lost}, p = {probability:.2g}: {'a difference' if probability < 0.05 else 'no difference'}")


if __name__ == "__main__":
    main()
