"""Work that visual tokens leave out in some layers, against upstream's layers with it taken away afterwards."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from holitom_hf.configuration import HoliTomConfig
from holitom_hf.evaluation.operations import GROUPED_PRODUCTS
from holitom_hf.merging.inner import SKIP_METHODS
from holitom_hf.models.operations import decoder_flops
from holitom_hf.models.pressing import pressing
from holitom_hf.models.upstream import cache_of

from ..conftest import make_prompt, make_video, pad_batch
from ..reference import PlainGenerator
from . import qwen


SHORTENED = {
    "outer_method": "holitom",
    "exact_budget": True,
    "position_ids": "kept",
    "proportional_attention": True,
}


def skipping(method: str, layers=(1, 3), **fields) -> HoliTomConfig:
    values = {"outer_method": "none", "retention_ratio": 0.3, "inner_method": method, "skipped_layers": list(layers)}
    return HoliTomConfig(**values | fields)


@torch.no_grad()
@pytest.mark.parametrize(("method", "outer"), [("skip_ffn", {}), ("skip_attention", SHORTENED), ("freeze", SHORTENED)])
def test_it_is_the_plain_loop(subject, method, outer):
    if subject.name == "llava_video":
        outer = {name: value for name, value in outer.items() if name != "position_ids"}
    settings = skipping(method, **outer)
    ids, video = subject.prompt(3, 6, 5), subject.video(6, seed=1)
    inputs = subject.inputs([ids], [video])
    if subject.name == "llava_video":
        settings = subject.model.model.settings_for(settings)
    logits = subject.model(**inputs, holitom_config=settings).logits[0]
    torch.testing.assert_close(logits, subject.logits(ids, video, settings), atol=2e-4, rtol=2e-4)
    whole = subject.model(**inputs, holitom_config=settings.overlaid({"inner_method": "none"})).logits[0]
    assert (logits[-1] - whole[-1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3_vl_moe", "skip_attention"),
        ("qwen3_vl_moe", "freeze"),
        ("qwen3_5", "skip_ffn"),
        ("qwen3_5_moe", "freeze"),
    ],
)
def test_experts_and_layers_of_linear_attention(name, method):
    torch.manual_seed(0)
    family = qwen.FAMILIES[name]
    config = family.ours("Config")(**family.values, holitom_config=qwen.ON)
    model = family.generation(config).eval()
    plain = qwen.PlainQwen(model, family.upstream, family.upstream.config_class(**family.values))
    types = getattr(config.text_config, "layer_types", ["full_attention"] * config.text_config.num_hidden_layers)
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    settings = skipping(method, [0, 1] if method == "skip_ffn" else full[:2])
    ids, video = qwen.make_prompt(3, (4, 6, 8), 5, is_timed=True), qwen.video((4, 6, 8), 1)
    inputs = qwen.inputs_of([ids], [video])
    logits = model(**inputs, holitom_config=settings).logits[0]
    expected = plain.logits(ids, [plain.encode(*video, settings)], settings, None, [video])
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4)
    if "linear_attention" in types and method != "skip_ffn":
        with pytest.raises(ValueError, match=r"layers \[0\] have not: choose skipped_layers among"):
            model(**inputs, holitom_config=settings.overlaid({"skipped_layers": [0]}))
    if name.endswith("moe"):
        batch = qwen.inputs_of([ids, qwen.make_prompt(2, (4, 6, 8), 9, is_timed=True)], [video, video])
        outputs = model(**batch, labels=batch["input_ids"], holitom_config=settings, output_router_logits=True)
        counts = {len(layer) for layer in outputs.router_logits}
        num_real, num_visual = int(batch["attention_mask"].sum()), int((batch["mm_token_type_ids"] == 2).sum())
        assert counts == ({num_real} if method == "skip_attention" else {num_real, num_real - num_visual})
        assert outputs.aux_loss.isfinite()


@pytest.fixture(scope="module")
def prompts():
    return [make_prompt(3, "video:5", 8, seed=21), make_prompt(2, "video:5", 3, seed=22)]


@pytest.fixture(scope="module")
def videos():
    return [make_video(5, seed=23), make_video(5, seed=24, num_scenes=3)]


@pytest.fixture
def batch(prompts, videos):
    ids, mask = pad_batch(prompts)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(videos)}


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "offloaded cache": {"do_sample": False, "cache_implementation": "offloaded"},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunks": {"do_sample": False, "prefill_chunk_size": 16},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize(
    ("method", "mode"), [("skip_ffn", "greedy"), ("skip_attention", "greedy"), *(("freeze", mode) for mode in MODES)]
)
def test_generation_of_padded_rows_is_that_of_the_plain_loop(model, plain, prompts, videos, batch, method, mode):
    """Left padding, HoliTom before the decoder; assisted decoding takes one row."""
    settings = skipping(method, outer_method="holitom")
    reference = PlainGenerator.over(plain, prompts, [[video] for video in videos], settings)
    if mode == "prompt lookup":
        batch = {"input_ids": prompts[0][None], "pixel_values_videos": videos[0][None]}
    elif mode == "offloaded cache" and not torch.cuda.is_available():
        pytest.skip("offloads from a GPU")
    texts = {name: value for name, value in batch.items() if name != "pixel_values_videos"}
    kwargs = {name: value for name, value in MODES[mode].items() if name in ("do_sample", "num_beams")}
    expected = reference.generate(**texts, **kwargs, max_new_tokens=4, use_cache=False)
    found = model.generate(**batch, **MODES[mode], max_new_tokens=4, holitom_config=settings)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", SKIP_METHODS)
@pytest.mark.parametrize(("implementation", "side"), [("eager", "left"), ("sdpa", "right")])
def test_a_padded_batch_has_the_logits_of_its_rows(model, plain, prompts, videos, method, implementation, side):
    settings = skipping(method)
    ids, mask = pad_batch(prompts)
    if side == "right":
        ids, mask = (values.clone() for values in (ids, mask))
        num_padding = int((mask[1] == 0).sum())
        ids[1], mask[1] = ids[1].roll(-num_padding), mask[1].roll(-num_padding)
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        logits = model(
            input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos), holitom_config=settings
        ).logits
    finally:
        model.set_attn_implementation(before)
    for row, (prompt, video) in enumerate(zip(prompts, videos)):
        expected = plain.logits(prompt, [video], settings)
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", SKIP_METHODS)
def test_a_later_turn_brings_another_video(model, plain, method):
    """Behind a turn that stage 3 shortened, too: its layers then hold fewer positions than those before."""
    first, second = make_prompt(3, "video:5", 4, seed=1), make_prompt(2, "video:4", 3, seed=2)
    videos = [make_video(5, seed=3), make_video(4, seed=4)]
    settings = skipping(method, [0, 1, 3])
    for cache in (None, StaticCache(model.config.text_config, max_cache_len=2 * len(first))):
        outputs = model(
            input_ids=first[None], pixel_values_videos=videos[0][None], holitom_config=settings, cache=cache
        )
        later = model(
            input_ids=second[None],
            pixel_values_videos=videos[1][None],
            holitom_config=settings,
            cache=cache_of(outputs),
        )
        expected = plain.logits(torch.cat([first, second]), videos, settings)
        torch.testing.assert_close(later.logits[0], expected[len(first) :], atol=2e-4, rtol=2e-4)
    merged = settings.overlaid({"inner_method": "merge", "inner_merge_layer": 2})
    outputs = model(input_ids=first[None], pixel_values_videos=videos[0][None], holitom_config=merged)
    later = model(
        input_ids=second[None],
        pixel_values_videos=videos[1][None],
        holitom_config=settings,
        cache=cache_of(outputs),
    )
    assert later.logits.isfinite().all()
    assert cache_of(later).compressed_sequence.inner_layer == 2


@torch.no_grad()
def test_no_skipped_layers_change_nothing(model, upstream, batch):
    for fields in ({"skipped_layers": None}, {"skipped_layers": []}):
        settings = skipping("freeze").overlaid(fields)
        assert settings.is_identity
        assert torch.equal(model(**batch, holitom_config=settings).logits, upstream(**batch).logits)
    own = HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2)
    named = own.overlaid({"skipped_layers": [1]})  # which stage 3 does not look at
    assert torch.equal(model(**batch, holitom_config=own).logits, model(**batch, holitom_config=named).logits)


@pytest.mark.parametrize("method", ["skip_ffn", "freeze"])
def test_gradients_are_those_of_the_plain_layers(model, batch, method):
    """With gradient checkpointing, too: recomputed layers leave the same out."""
    settings, found = skipping(method, outer_method="holitom"), []
    kwargs = batch | {"labels": batch["input_ids"], "holitom_config": settings, "use_cache": False}
    for is_checkpointed in (False, True):
        model.zero_grad()
        model.train()
        try:
            if is_checkpointed:
                model.gradient_checkpointing_enable()
            model(**kwargs).loss.backward()
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    assert found[0]["model.language_model.layers.1.mlp.up_proj.weight"].abs().max() > 0
    # Against a difference of the loss in one direction.
    weight = model.model.language_model.layers[1].self_attn.v_proj.weight
    direction = found[0]["model.language_model.layers.1.self_attn.v_proj.weight"]
    direction, losses = direction / direction.norm(), []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            weight += step * direction
            losses.append(float(model(**kwargs).loss))
            weight -= step * direction
    slope = float((found[0]["model.language_model.layers.1.self_attn.v_proj.weight"] * direction).sum())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize(
    ("name", "method"), [*(("llava_onevision", method) for method in SKIP_METHODS), ("qwen3_vl", "freeze")]
)
def test_the_decoder_has_the_operations_that_torch_counts(model, name, method):
    if name == "qwen3_vl":
        family = qwen.FAMILIES[name]
        model = family.generation(family.ours("Config")(**family.values, holitom_config=qwen.ON)).eval()
        ids, video = qwen.make_prompt(3, (6, 6, 8), 5, is_timed=True), qwen.video((6, 6, 8), 1)
        inputs = qwen.inputs_of([ids], [video])
        num_visual = int((inputs["mm_token_type_ids"] == 2).sum())
    else:
        ids = make_prompt(3, "video:5", 8, seed=21)
        inputs = {"input_ids": ids[None], "pixel_values_videos": make_video(5, seed=23)[None]}
        num_visual = int((ids == model.config.video_token_id).sum())
    text = model.config.text_config
    settings = skipping(method, [0, 2])
    without = settings.overlaid({"skipped_layers": None})

    @torch.no_grad()
    def counted(used: HoliTomConfig) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=GROUPED_PRODUCTS) as counter:
            model(**inputs, holitom_config=used, logits_to_keep=1)
        return counter.get_total_flops()

    layers = [len(ids)] * text.num_hidden_layers
    saved = decoder_flops(text, layers) - decoder_flops(text, layers, settings, num_visual)
    assert saved == counted(without) - counted(settings) > 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["skip_attention", "freeze"])
def test_a_press_of_layers_that_visual_tokens_skip_is_refused(model, prompts, videos, method):
    row = {"input_ids": prompts[0].view(1, -1), "pixel_values_videos": videos[0][None]}
    press = SimpleNamespace(post_init_from_model=lambda model: None, forward_hook=lambda *args: args[-1])
    with pressing(model, press):
        model(**row, holitom_config=skipping("skip_ffn"))
        with pytest.raises(ValueError, match="layer 1 can't be pressed"):
            model(**row, holitom_config=skipping(method))


def test_what_can_not_be_is_refused(model, batch):
    with pytest.raises(
        ValueError, match=r"skipped_layers is \[1, 9\], but the decoder has \d layers: choose from 0 to"
    ):
        model(**batch, holitom_config=skipping("skip_ffn", [1, 9]))
    with pytest.raises(ValueError, match="hidden states can't be recorded"):
        model(**batch, holitom_config=skipping("skip_ffn"), output_hidden_states=True)
    before = model.config._attn_implementation
    model.set_attn_implementation("flex_attention")
    try:
        with pytest.raises(ValueError, match="'flex_attention' is not told: load the model with"):
            model(**batch, holitom_config=skipping("freeze"))
    finally:
        model.set_attn_implementation(before)
