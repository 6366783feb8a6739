"""Steps that see few visual entries, against steps whose masks hide what a plain loop leaves out."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from holitom_hf.models.dynamic_pruning import dynamic_pruning
from holitom_hf.models.upstream import cache_of

from ..conftest import make_prompt, make_video
from .test_evicting import CLOSE, GREEDY, ROWS, Hiding, batch_of, drawn_tokens, mask_of, steps_of, visual_places


LAYER, RATIO = 3, 0.7


def likeness(first: list[float], second: list[float]) -> float:
    norms = [sum(value * value for value in values) ** 0.5 for values in (first, second)]
    return sum(a * b for a, b in zip(first, second)) / (norms[0] * norms[1])


def left_out(received: list[float]) -> list[int]:
    """Of entries in order those that a step does not see."""
    number = max(1, round(len(received) * (1 - RATIO)))
    kept = sorted(range(len(received)), key=lambda i: (-received[i], i))[:number]
    return [i for i in range(len(received)) if i not in kept]


@pytest.mark.parametrize(("has_inner", "implementation"), [(True, "sdpa"), (False, "eager")])
@torch.no_grad()
def test_steps_are_those_of_masks_that_hide_what_a_plain_loop_leaves_out(subject, has_inner, implementation):
    model, (inputs, videos) = subject.model, batch_of(subject)
    settings = replace(model.config.holitom_config, **({} if has_inner else {"inner_merge_layer": None}))
    inputs["holitom_config"], tokens = settings, drawn_tokens(len(ROWS))
    model.set_attn_implementation("eager")
    outputs = model(**inputs)
    visual = visual_places(subject, inputs, videos, outputs, settings)[1 if has_inner else 0]

    # Layers before see everything, whatever is hidden from those behind.
    steps = steps_of(model, copy.deepcopy(cache_of(outputs)), mask_of(inputs), tokens, output_attentions=True)
    received = [
        [[float(step.attentions[LAYER - 1][row, :, 0, p].mean()) for p in places] for row, places in enumerate(visual)]
        for step in steps
    ]
    alike = [[likeness(*pair) for pair in zip(*both)] for both in itertools.pairwise(received)]
    threshold = sorted(value for rows in alike for value in rows)[len(alike)] - 1e-6
    num_layers, mask, expected, counts = len(model.model.language_model.layers), mask_of(inputs), [], set()
    for number, token in enumerate(tokens):
        hidden = []
        for row, places in enumerate(visual):
            is_new = number == 0 or alike[number - 1][row] < threshold
            hidden.append([places[i] for i in left_out(received[number][row])] if is_new else [])
            counts.add(len(hidden[-1]))
        nothing = [[] for _ in ROWS]
        with Hiding(model, [nothing] * LAYER + [hidden] * (num_layers - LAYER)):
            expected += steps_of(model, cache_of(outputs), mask, [token])
        mask = torch.cat([mask, torch.ones_like(token)], 1)
    assert 0 in counts
    assert len(counts) > 1

    model.set_attn_implementation(implementation)
    with dynamic_pruning(model, LAYER, RATIO, threshold):
        past = cache_of(model(**inputs))
        lengths = [layer.get_seq_length() for layer in past.layers]
        ours = steps_of(model, past, mask_of(inputs), tokens)
    model.set_attn_implementation("sdpa")
    for step, plain in zip(ours, expected):
        torch.testing.assert_close(step.logits, plain.logits, **CLOSE)
    assert [layer.get_seq_length() for layer in past.layers] == [length + len(tokens) for length in lengths]


@torch.no_grad()
def test_generation_is_that_and_what_hides_nothing_changes_nothing(subject):
    model, (inputs, _) = subject.model, batch_of(subject)
    ways = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    plain = torch.stack(model.generate(**inputs, **ways).logits)
    results = []
    for ratio, threshold in ((0.0, 0.9), (RATIO, 1e-9), (RATIO, 2.0)):
        with dynamic_pruning(model, LAYER, ratio, threshold):
            results.append(torch.stack(model.generate(**inputs, **ways).logits))
    torch.testing.assert_close(results[0], plain, **CLOSE)
    # The first step has none before it and hides; after it, all steps are alike or none is.
    assert torch.equal(results[1][:2], results[2][:2])
    assert not torch.allclose(results[1][1], plain[1], **CLOSE)
    assert not torch.allclose(results[1][2], results[2][2], **CLOSE)


def test_what_is_refused(model):
    prompt = make_prompt(3, "video:5", 8)[None]
    inputs = {"input_ids": prompt, "pixel_values_videos": make_video(5, seed=1)[None]}
    cases = {
        "must be behind stage 3's, 3": {"holitom_config": {"inner_merge_layer": 3}},
        "from a DynamicCache alone": {"cache_implementation": "static"},
        "no visual entries .* there is none": {"use_cache": False},
    }
    for message, ways in cases.items():
        with pytest.raises(ValueError, match=message), dynamic_pruning(model, LAYER):
            model.generate(**inputs, **GREEDY, **ways)
    for arguments in ((0,), (5,), (3, 1.0)):
        with pytest.raises(ValueError, match="a layer behind one with attention"), dynamic_pruning(model, *arguments):
            pass
    assert not any(module._forward_pre_hooks for module in model.modules())
