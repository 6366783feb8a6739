"""
What the bookkeeping of a compressed cache adds to a decoding step, against upstream's class on an equally short cache.

    python examples/measure_decoding_steps.py [--steps 300] [--device cpu]

A LLaVA-OneVision with random weights and a decoder of Qwen2-0.5B's shape. Both classes hold the same weights, and
caches of the same length (stage 3 is off, so that all layers have it); they take turns. Prints medians.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import DynamicCache, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.models.upstream import CACHE_NAME


CONFIG = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 8,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 32000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "image_token_index": 31998,
    "video_token_index": 31999,
}
FRAMES, TOKENS_PER_FRAME = 16, 49


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    settings = HoliTomConfig(retention_ratio=0.15, inner_merge_layer=None)
    with torch.device(arguments.device):
        ours = HoliTomLlavaOnevisionForConditionalGeneration(
            HoliTomLlavaOnevisionConfig(**copy.deepcopy(CONFIG), holitom_config=settings)
        ).eval()
        theirs = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**copy.deepcopy(CONFIG))).eval()
        theirs.load_state_dict(ours.state_dict())

        prompt = torch.randint(0, 31000, (1, 20))
        ids = torch.cat([prompt, torch.full((1, FRAMES * TOKENS_PER_FRAME + 1), 31999), prompt], 1)
        cache = DynamicCache()
        ours(
            input_ids=ids,
            pixel_values_videos=torch.randn(1, FRAMES, 3, 112, 112),
            cache=cache,
            use_cache=True,
        )
        plain = DynamicCache()
        ids_left = torch.randint(0, 31000, (1, cache.get_seq_length()))
        theirs(input_ids=ids_left, use_cache=True, **{CACHE_NAME: plain})
        length = cache.get_seq_length()
        token = torch.tensor([[5]])

    def step(model, past, position: int) -> float:
        start = time.perf_counter()
        model(
            input_ids=token,
            position_ids=torch.tensor([[position]], device=arguments.device),
            use_cache=True,
            **{CACHE_NAME: past},
        )
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        past.crop(-1)
        return elapsed

    times = {"upstream": [], "holitom": []}
    for number in range(arguments.steps + 20):
        pair = [("upstream", theirs, plain, length), ("holitom", ours, cache, ids.shape[1])]
        for name, model, past, position in pair if number % 2 else pair[::-1]:
            elapsed = step(model, past, position)
            if number >= 20:
                times[name].append(elapsed)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    ratios = sorted(b / a for a, b in zip(times["upstream"], times["holitom"]))
    print(f"cache of {length} tokens for a prompt of {ids.shape[1]}, {arguments.steps} steps, {arguments.device}")
    print(f"upstream {medians['upstream']:.3f} ms, holitom {medians['holitom']:.3f} ms a step")
    overhead, paired = medians["holitom"] / medians["upstream"] - 1, ratios[len(ratios) // 2] - 1
    print(f"overhead {overhead:+.2%}; median of paired ratios {paired:+.2%}")


if __name__ == "__main__":
    main()
