"""
How much of real videos repeats: the share of patches that a vision tower has to compute, and what that does to its
features.

    python examples/measure_redundancy.py FILES... [--model NAME] [--frames 8 32 128] [--compared-frames 32]

Prints two Markdown tables. The first has shares of patches that are computed: of raw pixels (384x384, patches of
14x14, a mean difference below 4/255 repeats), and as `vision_reuse_layer` and `vision_reuse_threshold` decide of a
model's vision tower. The second has the cosine similarity of the tower's features with those of a tower that computes
all. A file with fewer frames than asked for is left out. Without a model it takes the small one that comes with the
package, which knows drawn clips only.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, interpolate

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.merging.patches import plan_patches
from holitom_hf.merging.segmentation import choose_segments, count_static_tokens, similarity_runs
from holitom_hf.models.siglip import HoliTomSiglipVisionModel
from holitom_hf.video.decoding import read_video


SIDE, PATCH_SIZE, LEVEL = 384, 14, 4 / 255
FRAMES_AT_ONCE = 8


def uniform_frames(path: Path, num_frames: int, side: int) -> torch.Tensor | None:
    """(F, 3, side, side) in [0, 1], evenly over a file; `None` if it has fewer."""

    def indices(metadata) -> np.ndarray:
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(num_frames, total), dtype=int)

    frames, _ = read_video(path, indices)
    if len(frames) < num_frames:
        return None
    resized = [interpolate(frame[None] / 255, (side, side), mode="bicubic", antialias=True) for frame in frames]
    return torch.cat(resized).clamp(0, 1)


def share_of_pixels(frames: torch.Tensor) -> float:
    """The share of patches of (F, 3, H, W) pixels that differ from the frame before or from their segment's first."""
    patches = frames.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)  # (F, 3, h, w, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (F, P, D)
    differences = torch.stack([(later - patch).abs().mean(-1) for patch, later in pairwise(patches)])
    runs = similarity_runs(-differences, -LEVEL)
    segments, _ = choose_segments(count_static_tokens(runs))
    is_computed = torch.ones(patches.shape[:2], dtype=torch.bool)
    for start, stop in segments:
        for frame in range(start + 1, stop):
            repeats_next = runs[stop - 2] >= stop - start - 1
            repeats_first = (patches[frame] - patches[start]).abs().mean(-1) < LEVEL
            is_computed[frame] = ~(repeats_next & repeats_first)
    return is_computed.float().mean().item()


def shares_of_tower(
    tower: HoliTomSiglipVisionModel, pixels: torch.Tensor, layers: list[int], thresholds: list[float]
) -> list[float]:
    """The shares that are computed of (F, 3, H, W) normed pixels: after every layer, at every threshold."""
    states = tower.first_states(pixels.split(FRAMES_AT_ONCE), max(layers), set(layers), {})
    return [
        plan_patches(states[layer], [len(pixels)], settings_of(layer, threshold)).is_computed.float().mean().item()
        for layer in layers
        for threshold in thresholds
    ]


def settings_of(layer: int, threshold: float) -> HoliTomConfig:
    return HoliTomConfig(vision_reuse_layer=layer, vision_reuse_threshold=threshold)


def compare_features(
    tower: HoliTomSiglipVisionModel, pixels: torch.Tensor, layers: list[int], thresholds: list[float]
) -> list[tuple[int, float, float, torch.Tensor]]:
    """For every setting: layer, threshold, share that is computed, and (F, P) similarity to what it is if all are."""
    chunks, last = pixels.split(FRAMES_AT_ONCE), len(tower.encoder.layers)
    whole = tower.post_layernorm(tower.first_states(chunks, last, set(), {})[last])
    rows = []
    for layer in layers:
        for threshold in thresholds:
            settings = settings_of(layer, threshold)
            plan, parts = tower.encode_changes(chunks, [len(pixels)], settings, {last}, FRAMES_AT_ONCE)
            states = tower.post_layernorm(torch.cat([part.frames(last) for part in parts]))
            share = plan.is_computed.float().mean().item()
            rows.append((layer, threshold, share, cosine_similarity(states, whole, dim=-1)))
    return rows


@torch.inference_mode()
def print_tables(
    tower: HoliTomSiglipVisionModel, mean: list[float], std: list[float], arguments: argparse.Namespace
) -> None:
    """
    Args:
        tower: Any SigLIP tower.
        mean, std: What its pixels are normed with, per channel.
        arguments: See [`parse`].
    """
    side = tower.config.image_size
    layers, thresholds = arguments.layers, arguments.thresholds
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    settings = [f"layer {layer}, {threshold:g}" for layer in layers for threshold in thresholds]
    print("| file | frames | pixels | " + " | ".join(settings) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(settings))
    compared = []
    for path in arguments.files:
        for num_frames in arguments.frames:
            frames = uniform_frames(path, num_frames, SIDE)
            if frames is None:
                continue
            shares = [share_of_pixels(frames)]
            frames = frames if side == SIDE else uniform_frames(path, num_frames, side)
            pixels = (frames - mean) / std
            shares += shares_of_tower(tower, pixels, layers, thresholds)
            print(
                f"| {path.name} | {num_frames} | " + " | ".join(f"{share:.0%}" for share in shares) + " |", flush=True
            )
            if num_frames == arguments.compared_frames:
                compared.append((path, compare_features(tower, pixels, layers, thresholds)))
    print("\n| file | layer | threshold | computed | cosine, mean | 1st percentile |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for path, rows in compared:
        for layer, threshold, share, similarity in rows:
            numbers = f"{similarity.mean():.4f} | {np.percentile(similarity.numpy(), 1):.4f}"
            print(f"| {path.name} | {layer} | {threshold:g} | {share:.0%} | {numbers} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a LLaVA-OneVision")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--compared-frames", type=int, default=32, help="of --frames, the one for the second table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    processor = HoliTomProcessor.from_pretrained(arguments.model).video_processor
    print_tables(model.model.vision_tower, processor.image_mean, processor.image_std, arguments)


if __name__ == "__main__":
    main()
