"""What all tokens of the question attend to, of any head: PruneVid's second stage, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from holitom_hf import HoliTomConfig
from holitom_hf.models.upstream import cache_of
from holitom_hf.sequence.question_positions import question_positions

from ..conftest import make_prompt, make_video, pad_batch


USED = HoliTomConfig(retention_ratio=0.4, inner_method="prune_by_question", inner_merge_layer=2, inner_merge_ratio=0.6)
NEW = 4


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=4), st.data())
def test_the_question_is_what_stands_behind_the_last_video(rows, data):
    lasts = [data.draw(st.integers(0, 7)) for _ in rows]
    found = question_positions(torch.tensor(rows), torch.tensor(lasts))
    questions = []
    for row, last in zip(rows, lasts):
        videos = [place for place in range(last + 1) if row[place]]
        questions.append(list(range(videos[-1] + 1, last + 1)) if videos else [])
        questions[-1] = questions[-1] or [last]
    assert found.shape[1] == max(map(len, questions))
    for places, question in zip(found.tolist(), questions):
        assert places[: len(places) - len(question)] == [question[0]] * (len(places) - len(question))
        assert places[len(places) - len(question) :] == question


def test_generation_without_a_cache_and_on_a_static_one_is_that_with_one(model):
    prompts = [make_prompt(3, "video:6", 9, seed=1), make_prompt(2, "video:6", 4, seed=2)]
    ids, mask = pad_batch(prompts)
    inputs = {"input_ids": ids, "attention_mask": mask, "holitom_config": USED}
    inputs["pixel_values_videos"] = torch.stack([make_video(6, seed=3), make_video(6, seed=4)])
    greedy = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    dynamic, *others = (
        model.generate(**inputs, **greedy, **ways)
        for ways in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    )
    for other in others:
        assert torch.equal(dynamic.sequences, other.sequences)
        torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(other.logits), atol=1e-5, rtol=1e-5)
    asked = model(**inputs).inner_keep
    by_last = model(**inputs | {"holitom_config": {**USED.to_dict(), "inner_method": "prune"}}).inner_keep
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(asked, by_last))


@torch.no_grad()
def test_a_second_video_is_chosen_by_the_question_of_its_turn(model, plain):
    videos, cache = [make_video(5, seed=5), make_video(4, seed=6)], DynamicCache()
    first, turn = make_prompt(3, "video:5", 6, seed=7), make_prompt(2, "video:4", 5, seed=8)
    model(input_ids=first[None], pixel_values_videos=videos[0][None], cache=cache, holitom_config=USED)
    whole = torch.cat([first, turn])
    logits = model(input_ids=turn[None], pixel_values_videos=videos[1][None], cache=cache, holitom_config=USED).logits[
        0
    ]
    expected = plain.logits(whole, videos, USED, [len(first), len(whole)])[len(first) :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("parts", [(3, "video:5"), ("video:5", 1, "video:4", 1)])
def test_without_a_question_or_with_one_word_the_largest_of_the_last_token_s_heads_counts(model, plain, parts):
    prompt = make_prompt(*parts, seed=9)
    videos = [make_video(int(part[6:]), seed=i) for i, part in enumerate(parts) if isinstance(part, str)]
    outputs = model(input_ids=prompt[None], pixel_values_videos=videos, holitom_config=USED)
    torch.testing.assert_close(outputs.logits[0], plain.logits(prompt, videos, USED), atol=1e-5, rtol=1e-5)
    assert cache_of(outputs).get_seq_length(2) < cache_of(outputs).get_seq_length(1)
