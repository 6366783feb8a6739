"""
The checks that transformers' own ModelTesterMixin and GenerationTesterMixin make, by intent.

The installed package does not carry them (`make test-upstream` downloads and runs them), so what they ask of a model
class is asked here once more, for ours, with all three stages on. Elsewhere: gradient checkpointing in
test_training.py; save and load in test_checkpoint.py; cache formats, beams, assisted decoding, attention
implementations and compiling in test_generation.py; torch.export in test_export.py; offloading and tensor parallel in
test_devices.py; padding in test_modeling.py.

Upstream tests and we don't: CUDA and multi-GPU runs, flash kernels themselves, DeepSpeed and FSDP, ONNX, dynamic RoPE
scaling, and what belongs to encoder-decoder models.
"""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
)
from holitom_hf.models.upstream import cache_of

from ..conftest import SMALL, make_prompt, make_video, pad_batch


CLASSES = [HoliTomLlavaOnevisionModel, HoliTomLlavaOnevisionForConditionalGeneration]
PARENTS = {
    HoliTomLlavaOnevisionModel: LlavaOnevisionModel,
    HoliTomLlavaOnevisionForConditionalGeneration: LlavaOnevisionForConditionalGeneration,
}


def make(cls, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(SMALL)
    config["text_config"] |= changes.pop("text_config", {})
    return cls(
        HoliTomLlavaOnevisionConfig(
            **config | changes, holitom_config=HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2)
        )
    )


@pytest.fixture
def inputs():
    ids, mask = pad_batch([make_prompt(3, "video:4", 5, seed=1), make_prompt(2, "video:4", 3, seed=2)])
    videos = torch.stack([make_video(4, seed=3), make_video(4, seed=4)])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": videos}


@pytest.mark.parametrize("cls", CLASSES)
def test_the_forward_signature_is_upstreams_with_additions_behind(cls):
    theirs = list(inspect.signature(PARENTS[cls].forward).parameters)
    ours = list(inspect.signature(cls.forward).parameters)
    assert ours[: len(theirs) - 1] == theirs[:-1]  # all but **kwargs
    assert set(ours) - set(theirs) == {"holitom_config", "vision_batch_size", "prompt_length"}


def test_every_weight_is_initialized_by_the_config(inputs):
    """With a tiny range every linear and embedding weight of the decoder is tiny, in our subclass of it, too."""
    model = make(HoliTomLlavaOnevisionForConditionalGeneration, text_config={"initializer_range": 1e-9})
    for module in model.model.language_model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert module.weight.abs().max() < 1e-7
    fresh = make(HoliTomLlavaOnevisionForConditionalGeneration)
    assert all(torch.isfinite(weight).all() for weight in fresh.parameters())


@pytest.mark.parametrize("cls", CLASSES)
def test_the_same_input_gives_the_same_output(cls, inputs):
    model = make(cls).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tuple_holds_what_the_dictionary_does(cls, inputs):
    model = make(cls).eval()
    with torch.no_grad():
        whole, pair = model(**inputs), model(**inputs, return_dict=False)
    for one, two in zip(whole.to_tuple(), pair):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two)


def test_hidden_states_and_attentions_have_documented_lengths(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration)
    model.set_attn_implementation("eager")
    outputs = model.eval()(**inputs, output_hidden_states=True, output_attentions=True)
    record = cache_of(outputs).compressed_sequence
    n, m = record.outer_mask.shape[1], record.inner_mask.shape[1]
    assert [states.shape for states in outputs.hidden_states] == [(2, n, 32)] * 3 + [(2, m, 32)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, n, n)] * 2 + [(2, 4, m, m)] * 3
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1)[:, :, -1], torch.ones(2, 4))


def test_gradients_reach_hidden_states_and_attentions(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    for kept in (*outputs.hidden_states, *outputs.attentions):
        kept.retain_grad()
    outputs.logits.sum().backward()
    assert all(kept.grad is not None for kept in (*outputs.hidden_states, *outputs.attentions))


def test_resized_embeddings_run_and_keep_the_old_rows(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    with torch.no_grad():
        before = model(**inputs).logits
        rows = model.get_input_embeddings().weight.clone()
        model.resize_token_embeddings(130)
        after = model(**inputs).logits
    assert model.config.text_config.vocab_size == 130
    assert model.get_output_embeddings().weight.shape[0] == 130
    assert torch.equal(model.get_input_embeddings().weight[:120], rows)
    torch.testing.assert_close(after[..., :120], before)


def test_tied_weights_stay_tied_through_saving(inputs, tmp_path):
    model = make(
        HoliTomLlavaOnevisionForConditionalGeneration,
        tie_word_embeddings=True,
        text_config={"tie_word_embeddings": True},
    ).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("vision_feature_layer", [-1, -2, 0, [-1, -2], [1, 3]])
def test_other_vision_feature_layers(inputs, vision_feature_layer):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration, vision_feature_layer=vision_feature_layer).eval()
    if vision_feature_layer == 0:
        with pytest.raises(ValueError, match="vision_feature_layer 0 is the embedding"):
            model(**inputs)
        return
    with torch.no_grad():
        merged = model(**inputs).merged_videos[0][0]
    assert merged.num_tokens < merged.num_input_tokens


def test_batches_of_one_are_rows_of_the_batch(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    with torch.no_grad():
        whole = model(**inputs).logits
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = model(
                input_ids=inputs["input_ids"][row : row + 1, real],
                pixel_values_videos=inputs["pixel_values_videos"][row : row + 1],
            ).logits
            torch.testing.assert_close(whole[row, real], alone[0], atol=1e-5, rtol=1e-5)


def test_training_mode_runs_and_updates_every_trained_weight(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 118, -100)
    before = copy.deepcopy(model.state_dict())
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("vision_tower", "multi_modal_projector", "image_newline", "language_model.layers.4", "lm_head"):
        assert any(part in name for name in changed)


def test_moving_between_dtypes_and_copying(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
        double = copied.double()(**inputs | {"pixel_values_videos": inputs["pixel_values_videos"].double()}).logits
        torch.testing.assert_close(double.float(), model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_an_unknown_argument_of_generate_is_refused(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    with pytest.raises(ValueError, match=r"not used by the model: .*holitom_settings"):
        model.generate(**inputs, max_new_tokens=1, holitom_settings={})


def test_continuing_from_a_returned_cache_is_generating_longer(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    greedy = {"do_sample": False, "return_dict_in_generate": True}
    long = model.generate(**inputs, **greedy, max_new_tokens=6).sequences
    short = model.generate(**inputs, **greedy, max_new_tokens=3)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    rest = model.generate(
        input_ids=short.sequences,
        attention_mask=mask,
        cache=cache_of(short),
        **greedy,
        max_new_tokens=3,
    )
    assert torch.equal(rest.sequences, long)


def test_left_padding_more_changes_nothing(inputs):
    model = make(HoliTomLlavaOnevisionForConditionalGeneration).eval()
    padded = inputs | {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (5, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0)),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_stage_3_in_a_decoder_with_sliding_windows_is_refused(inputs):
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    model = make(HoliTomLlavaOnevisionForConditionalGeneration, text_config=sliding).eval()
    with pytest.raises(ValueError, match="stage 3 needs full attention, this decoder has sliding windows"):
        model(**inputs)
    with torch.no_grad():
        assert (
            model(**inputs, holitom_config={"retention_ratio": 0.3, "inner_merge_layer": None}).logits.isfinite().all()
        )
