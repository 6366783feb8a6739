"""
What HoliTom and farthest points compute of their own before the decoder, over the same features, in turns.

    python examples/measure_merging.py [--frames 32] [--rounds 15] [--retention-ratio 0.1]

Features of LLaVA-OneVision-7B's size: 196 tokens a frame of 3,584 channels, float32, in scenes of 8 frames in which 60
percent of the tokens repeat. HoliTom needs to know what each token receives of the vision tower's attention: here a
layer of its SigLIP (1,152 channels, 16 heads, 729 patches) with random weights. Farthest points need no such thing.
Prints medians and quartiles.
"""

import argparse

import torch
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from holitom_hf import HoliTomConfig
from holitom_hf.benchmarking.architectures import architecture
from holitom_hf.benchmarking.measuring import Spread, alternate
from holitom_hf.benchmarking.synthetic import synthetic_features
from holitom_hf.merging import merge_video_tokens
from holitom_hf.models.vision_importance import vision_importance


TOKENS_PER_FRAME = 196


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--retention-ratio", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config, num_frames, ratio = architecture("7b"), arguments.frames, arguments.retention_ratio
    features = synthetic_features(num_frames, TOKENS_PER_FRAME, config.text_config.hidden_size)
    importance = torch.rand(num_frames, TOKENS_PER_FRAME)
    vision = config.vision_config
    vision._attn_implementation = "sdpa"
    layer = SiglipEncoderLayer(vision).eval()
    hidden = torch.randn(num_frames, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    holitom = HoliTomConfig(retention_ratio=ratio)
    farthest = HoliTomConfig.from_preset("farthest-points-r10")
    farthest.retention_ratio = ratio

    times = alternate(
        {
            "importance": lambda: vision_importance(layer, hidden),
            "stages 1 and 2": lambda: merge_video_tokens(features, importance, holitom),
            "farthest points": lambda: merge_video_tokens(features, importance, farthest),
        },
        torch.device("cpu"),
        arguments.rounds,
    )
    ours, stages = times["farthest points"], times["stages 1 and 2"]
    times["HoliTom, importance and stages"] = [a + b for a, b in zip(times["importance"], stages)]
    print(f"{num_frames} frames, R = {ratio:.0%}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, values in times.items():
        spread = Spread.of(values)
        print(f"{name}: {1000 * spread.median:.1f} ms [{1000 * spread.lower:.1f}, {1000 * spread.upper:.1f}]")
    for name in ("HoliTom, importance and stages", "stages 1 and 2"):
        spread = Spread.of([own / theirs for own, theirs in zip(ours, times[name])])
        print(f"farthest points / {name}: {spread.median:.3f} [{spread.lower:.3f}, {spread.upper:.3f}]")


if __name__ == "__main__":
    main()
