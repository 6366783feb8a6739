"""
Random batches, videos and settings: generation with the cache against the plain loop.

`pytest tests/test_fuzzing.py --fuzz-cases 5000` for a longer run.
"""

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.models.upstream import cache_of

from ..conftest import FUZZ_CASES
from ..reference import PlainModel


LAYERS, VIDEO, PAD = 3, 61, 0


@functools.cache
def models(grid: int) -> tuple[HoliTomLlavaOnevisionForConditionalGeneration, PlainModel]:
    """A model whose frames have grid x grid patches, pooled to half of it, and its plain counterpart."""
    torch.manual_seed(grid)
    config = HoliTomLlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 2 * grid,
            "patch_size": 2,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 62,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
        image_token_index=60,
        video_token_index=VIDEO,
        holitom_config=HoliTomConfig(inner_merge_layer=None),
    )
    model = HoliTomLlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.ndim > 1 else 1.0)
    return model, PlainModel(model)


CONFIGS = st.builds(
    HoliTomConfig,
    retention_ratio=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.8, 1.0]),
    similarity_threshold=st.sampled_from([0.2, 0.6, 0.8, 0.95]),
    max_segment_frames=st.sampled_from([None, None, 1, 2]),
    cluster_neighbors=st.sampled_from([2, 7]),
    cluster_center_weight=st.sampled_from([0.6, 0.25]),
    contextual_ratio=st.sampled_from([0.0, 0.0, 0.5]),
    inner_merge_layer=st.sampled_from([None, 1, 2]),
    inner_merge_ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    outer_method=st.sampled_from(["holitom", "holitom", "none"]),
    inner_method=st.sampled_from(["merge", "merge", "prune", "none"]),
    position_ids=st.sampled_from(["packed", "packed", "kept"]),
    proportional_attention=st.booleans(),
)
# A row: text and videos in any order, text last; a number is that many text tokens, (f,) a video of f frames.
ROWS = st.lists(
    st.tuples(st.lists(st.one_of(st.integers(0, 3), st.tuples(st.integers(1, 4))), max_size=4), st.integers(1, 4)).map(
        lambda parts: [*parts[0], parts[1]]
    ),
    min_size=1,
    max_size=3,
)


def check_case(grid, rows, config, side, change, seed):
    model, plain = models(grid)
    random = torch.Generator().manual_seed(seed)
    tokens_per_frame = (-(-grid // 2)) ** 2
    prompts, videos = [], []
    for row in rows:
        ids, row_videos = [], []
        for part in row:
            if isinstance(part, int):
                ids.append(torch.randint(1, 59, (part,), generator=random))
                continue
            ids.append(torch.full((part[0] * tokens_per_frame + 1,), VIDEO))
            still = torch.randn(1, 3, 2 * grid, 2 * grid, generator=random)
            row_videos.append(still + change * torch.randn(part[0], 3, 2 * grid, 2 * grid, generator=random))
        prompts.append(torch.cat(ids))
        videos.append(row_videos)
    length = max(map(len, prompts))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros((len(rows), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    flat = [video for row in videos for video in row]
    inputs = {"input_ids": ids, "attention_mask": mask, "holitom_config": config}
    if flat:
        inputs["pixel_values_videos"] = flat
    with torch.no_grad():
        # As `generate` does: upstream's forward alone would count padding as positions.
        outputs = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        encoded = [[plain.encode(video, config) for video in row] for row in videos]
        for row, prompt in enumerate(prompts):
            expected = plain.logits(prompt, None, config, len(prompt), encoded=encoded[row])
            torch.testing.assert_close(outputs.logits[row][mask[row].bool()], expected, atol=1e-4, rtol=1e-4)
        # Two more tokens of each row, whatever they are, through the cache.
        for step in range(2):
            token = torch.randint(1, 59, (len(rows), 1), generator=random)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            outputs = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                cache=cache_of(outputs),
                holitom_config=config,
            )
            if step == 1 and side == "left":
                generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)
                assert torch.equal(generated[:, :-1], ids)
            longer = [torch.cat([prompt, token[row]]) for row, prompt in enumerate(prompts)]
            for row, prompt in enumerate(longer):
                logits = plain.logits(prompt, None, config, len(prompts[row]) - step, encoded=encoded[row])
                torch.testing.assert_close(outputs.logits[row, -1], logits[-1], atol=1e-4, rtol=1e-4)
            prompts = longer


def test_random_cases_agree_with_the_plain_loop(request):
    num_cases = request.config.getoption("--fuzz-cases")

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=num_cases == FUZZ_CASES,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(
        st.sampled_from([4, 5, 6]),
        ROWS,
        CONFIGS,
        st.sampled_from(["left", "right"]),
        st.sampled_from([0.05, 0.5, 2.0]),
        st.integers(0, 2**20),
    )
    def run(grid, rows, config, side, change, seed):
        check_case(grid, rows, config, side, change, seed)

    run()
