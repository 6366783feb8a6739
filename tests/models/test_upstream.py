"""What callers say to the model and get from it is what they say to upstream's class of the installed release."""

import contextlib
import inspect
from dataclasses import fields

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from holitom_hf.models.llava_onevision.outputs import HoliTomCausalLMOutputWithPast, HoliTomModelOutputWithPast
from holitom_hf.models.outputs import CompressedOutput
from holitom_hf.models.upstream import CACHE_NAME, cache_of

from ..conftest import IDENTITY, make_prompt, make_video


OLD_NAME = "past_key_values"
OWN_FIELDS = {"merged_videos", "inner_keep", "output_index"}
GREEDY = {"do_sample": False, "max_new_tokens": 3}
PROMPT = make_prompt(3, "video:4", 5, seed=1)[None]
VIDEO = make_video(4, seed=2)[None]


def upstreams_answer_to(name: str):
    """Silence, or a warning about the old name of the cache where there is a new one."""
    is_deprecated = name == OLD_NAME != CACHE_NAME
    return pytest.warns(FutureWarning, match=OLD_NAME) if is_deprecated else contextlib.nullcontext()


def test_the_name_is_that_of_the_installed_release():
    assert CACHE_NAME in inspect.signature(create_causal_mask).parameters


@torch.no_grad()
def test_forward_takes_both_names_of_the_cache(model):
    logits = []
    for name in ("cache", OLD_NAME):
        past = DynamicCache()
        with upstreams_answer_to(name):
            model(input_ids=PROMPT, pixel_values_videos=VIDEO, **{name: past})
            logits.append(model(input_ids=make_prompt(4, seed=4)[None], **{name: past}).logits)
    assert torch.equal(*logits)


def test_generate_takes_both_names_of_the_cache(model):
    answers = []
    for name in ("cache", OLD_NAME):
        past = DynamicCache()
        with upstreams_answer_to(name):
            first = model.generate(input_ids=PROMPT, pixel_values_videos=VIDEO, **GREEDY, **{name: past})
            answers.append(model.generate(input_ids=first, **GREEDY, **{name: past}))
        assert past.compressed_sequence.seen_length(past) == answers[-1].shape[1] - 1
    assert torch.equal(*answers)


@pytest.mark.parametrize("holitom_config", [IDENTITY, None])
@pytest.mark.parametrize("has_head", [True, False])
@torch.no_grad()
def test_outputs_have_what_upstreams_have(model, upstream, holitom_config, has_head):
    inputs = {
        "input_ids": make_prompt(3, "video:4", 2, f"image:{2 * 64 + 8}", 5, seed=1)[None],
        "pixel_values_videos": VIDEO,
        "pixel_values": torch.randn(1, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]]),
    }
    ours, theirs = (model, upstream) if has_head else (model.model, upstream.model)
    outputs, expected = ours(**inputs, holitom_config=holitom_config), theirs(**inputs)
    assert set(outputs) - OWN_FIELDS == set(expected)
    assert outputs.past_key_values is outputs[OLD_NAME] is cache_of(outputs)
    torch.testing.assert_close(outputs.video_hidden_states.flatten(0, -2), expected.video_hidden_states.flatten(0, -2))


@pytest.mark.parametrize("output_class", [HoliTomModelOutputWithPast, HoliTomCausalLMOutputWithPast])
def test_output_classes_have_upstreams_fields_first(output_class):
    _, own, upstreams, *_ = output_class.__mro__
    assert own is CompressedOutput
    names = [field.name for field in fields(output_class)]
    assert names[: len(fields(upstreams))] == [field.name for field in fields(upstreams)]


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_no_name_is_used_that_upstream_calls_deprecated(model, kwargs):
    logging.warning_once.cache_clear()  # or it would not be said again
    with CaptureLogger(logging.get_logger("transformers")) as captured:
        outputs = model.generate(
            input_ids=PROMPT, pixel_values_videos=VIDEO, **GREEDY, **kwargs, return_dict_in_generate=True
        )
        model(input_ids=PROMPT, pixel_values_videos=VIDEO, labels=PROMPT)
    assert (outputs.merged_videos is None) == (kwargs == {"use_cache": False})
    assert "deprecated" not in captured.out
