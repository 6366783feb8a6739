"""The checks of test_upstream_checks.py for every Qwen-VL family, by intent, with all three stages on."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holitom_hf.models.upstream import CACHE_NAME, cache_of

from .qwen import FAMILIES, IMAGE, ON, VIDEO, VISION_END, VISION_START, inputs_of, make_prompt, video


GRIDS = [(4, 4, 8), (3, 8, 4)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def inputs(family):
    timed = {"is_timed": family.name != "Qwen2_5_VL"}
    prompts = [make_prompt(3, GRIDS[0], 5, seed=1, **timed), make_prompt(2, GRIDS[1], 4, seed=2, **timed)]
    inputs = inputs_of(prompts, [video(GRIDS[0], 3), video(GRIDS[1], 4)])
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def make(family, role="ForConditionalGeneration", **changes):
    torch.manual_seed(0)
    values = copy.deepcopy(family.values)
    values["text_config"] |= changes.pop("text_config", {})
    return family.ours(role)(family.ours("Config")(**values | changes, holitom_config=ON)).eval()


@pytest.mark.parametrize("role", ["Model", "ForConditionalGeneration"])
class TestBothClasses:
    def test_the_forward_signature_is_upstreams_with_additions_behind(self, family, role):
        ours = family.ours(role)
        upstream = next(c for c in ours.__mro__ if c.__module__.startswith("transformers.models."))
        theirs = [name for name in inspect.signature(upstream.forward).parameters if name != "kwargs"]
        found = inspect.signature(ours.forward).parameters
        own = {"holitom_config", "vision_batch_size", "prompt_length", "kwargs"}
        shared = {
            "second_per_grid_ts",
            "mm_token_type_ids",
            "mm_encoder_outputs",
            "use_cache",
        }  # of one family, or in **kwargs
        assert set(found) - set(theirs) <= own | shared
        assert set(theirs) - set(found) <= {"rope_deltas", "output_router_logits"}
        assert [name for name in found if name in theirs][:6] == [name for name in theirs if name in found][:6]

    @torch.no_grad()
    def test_the_same_input_gives_the_same_output(self, family, role, inputs):
        model = make(family, role)
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])

    @torch.no_grad()
    def test_a_tuple_holds_what_the_dictionary_does(self, family, role, inputs):
        model = make(family, role)
        whole, pair = model(**inputs), model(**inputs, return_dict=False)
        for one, two in zip(whole.to_tuple(), pair):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, two)


def test_every_weight_is_initialized_by_the_config(family):
    model = make(family, text_config={"initializer_range": 1e-9})
    for module in model.model.language_model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert module.weight.abs().max() < 1e-7
    assert all(torch.isfinite(weight).all() for weight in make(family).parameters())


def test_gradients_reach_hidden_states_and_attentions(family, inputs):
    model = make(family)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    record = cache_of(outputs).compressed_sequence
    n, m = record.outer_mask.shape[1], record.inner_mask.shape[1]
    assert m < n < inputs["input_ids"].shape[1]
    lengths = [states.shape[1] for states in outputs.hidden_states]
    assert lengths == sorted(lengths, reverse=True)
    assert (lengths[0], lengths[-1]) == (n, m)
    kept = [*outputs.hidden_states, *(weights for weights in outputs.attentions if weights is not None)]
    for states in kept:
        states.retain_grad()
    outputs.logits.sum().backward()
    assert all(states.grad is not None for states in kept)


@torch.no_grad()
def test_resized_embeddings_run_and_keep_the_old_rows(family, inputs):
    model = make(family)
    before, rows = model(**inputs).logits, model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(130)
    after = model(**inputs).logits
    assert model.config.text_config.vocab_size == 130
    assert model.get_output_embeddings().weight.shape[0] == 130
    assert torch.equal(model.get_input_embeddings().weight[:120], rows)
    torch.testing.assert_close(after[..., :120], before)


@torch.no_grad()
def test_tied_weights_stay_tied_through_saving(family, inputs, tmp_path):
    model = make(family, tie_word_embeddings=True, text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = family.generation.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_training_mode_runs_and_updates_every_trained_weight(family, inputs):
    model = make(family).train()
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("visual.patch_embed", "visual.blocks.3", "visual.merger", "language_model.layers.4", "lm_head"):
        assert any(part in name for name in changed), part


@torch.no_grad()
def test_moving_between_dtypes_and_copying(family, inputs):
    model = make(family)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
    copied.set_experts_implementation("eager")  # grouped products know no float64
    pixels = {"pixel_values_videos": inputs["pixel_values_videos"].double()}
    double = copied.double()(**inputs | pixels).logits
    torch.testing.assert_close(double.float(), model(**inputs).logits, atol=1e-3, rtol=1e-3)


def test_an_unknown_argument_of_generate_is_refused(family, inputs):
    with pytest.raises(ValueError, match=r"not used by the model: .*holitom_settings"):
        make(family).generate(**inputs, max_new_tokens=1, holitom_settings={})


def test_continuing_from_a_returned_cache_is_generating_longer(family, inputs):
    model = make(family)
    greedy = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "suppress_tokens": [VISION_START, VISION_END, IMAGE, VIDEO],
    }
    long = model.generate(**inputs, **greedy, max_new_tokens=6).sequences
    short = model.generate(**inputs, **greedy, max_new_tokens=3)
    rest = model.generate(
        input_ids=short.sequences,
        attention_mask=F.pad(inputs["attention_mask"], (0, 3), value=1),
        **{CACHE_NAME: cache_of(short)},
        **greedy,
        max_new_tokens=3,
    )
    assert torch.equal(rest.sequences, long)


@torch.no_grad()
def test_left_padding_more_changes_nothing(family, inputs):
    model, names = make(family), ("input_ids", "attention_mask", "mm_token_type_ids")
    padded = inputs | {name: F.pad(inputs[name], (5, 0)) for name in names}
    torch.testing.assert_close(model(**padded).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-5, rtol=1e-5)
