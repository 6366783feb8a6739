"""Kept positions, proportional attention, and choices that know the question; generation is in test_generation.py."""

import pytest
import torch

from holitom_hf.merging import METHODS
from holitom_hf.models.upstream import cache_of

from ..conftest import make_prompt, make_video, pad_batch


VIDEO = make_video(6, seed=41)
OURS = {"position_ids": "kept", "proportional_attention": True}
QUESTION = {"outer_method": "question_tokens", "retention_ratio": 0.2, "inner_method": "none"}


@pytest.fixture
def single():
    return {"input_ids": make_prompt(3, "video:6", 8, seed=40)[None], "pixel_values_videos": VIDEO[None]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_every_method_goes_on_with_its_cache_as_without_one(model, single, method, num_beams):
    settings = {"outer_method": method, "retention_ratio": 0.2, **OURS}
    kwargs = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": 5, "holitom_config": settings}
    assert torch.equal(model.generate(**single, **kwargs), model.generate(**single, **kwargs, use_cache=False))


@pytest.mark.parametrize("method", METHODS)
def test_importance_is_computed_for_methods_that_look_at_it(model, method):
    settings = {"outer_method": method, "retention_ratio": 0.2}
    encoded = model.get_video_features(VIDEO[None], holitom_config=settings)
    assert (encoded.importance is not None) == METHODS[method].needs_importance
    weighted = model.get_video_features(VIDEO[None], holitom_config=settings | {"importance_weight": 1.0})
    assert weighted.importance is not None


def test_places_and_sizes_make_a_difference(model, single):
    """What the other tests compare is not the same by chance."""
    with torch.no_grad():
        logits = [
            model(**single, holitom_config={"position_ids": position_ids, "proportional_attention": sized}).logits[
                0, -1
            ]
            for position_ids in ("packed", "kept")
            for sized in (False, True)
        ]
    for i in range(4):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 1e-3


def test_where_nothing_is_shortened_the_model_is_upstreams_to_the_bit(model, upstream, single):
    settings = {"retention_ratio": 1.0, "inner_method": "none", **OURS}
    with torch.no_grad():
        assert torch.equal(model(**single, holitom_config=settings).logits, upstream(**single).logits)


def test_a_conversation_keeps_its_sizes_when_a_later_call_does_not_ask_for_them(model, single):
    """They belong to what is in the cache; only what a later call merges counts as one each."""
    with torch.no_grad():
        first = model(**single, use_cache=True, holitom_config=OURS)
        record = cache_of(first).compressed_sequence
        sizes = record.outer_sizes.clone()
        assert sizes.max() > 1
        assert sizes.sum() == single["input_ids"].shape[1]
        assert record.inner_sizes.sum() == single["input_ids"].shape[1]
        again = model(
            input_ids=make_prompt(2, "video:4", 3, seed=44)[None],
            pixel_values_videos=make_video(4, seed=45)[None],
            cache=cache_of(first),
            holitom_config={"proportional_attention": False},
        )
    later = cache_of(again).compressed_sequence.outer_sizes
    assert torch.equal(later[:, : sizes.shape[1]], sizes)
    assert (later[:, sizes.shape[1] :] == 1).all()


def test_newlines_of_rows_have_no_place_to_keep(model, single):
    settings = {"newline_position": "row", "retention_ratio": 0.1, **OURS}
    with pytest.raises(ValueError, match='position_ids="kept" needs newline_position="end"'):
        model(**single, holitom_config=settings)


class TestQuestionTokens:
    def places(self, model, **inputs):
        with torch.no_grad():
            merged = model(**inputs, holitom_config=QUESTION).merged_videos
        return [[video.place.tolist() for video in row] for row in merged]

    def test_another_question_keeps_other_tokens_and_a_batch_changes_nothing(self, model):
        prompts = [make_prompt(3, "video:6", 8, seed=40), make_prompt("video:6", 5, "video:6", 4, seed=43)]
        ids, mask = pad_batch(prompts)
        videos = [VIDEO, VIDEO, make_video(6, seed=42)]
        rows = self.places(model, input_ids=ids, attention_mask=mask, pixel_values_videos=torch.stack(videos))
        alone = [
            self.places(model, input_ids=prompt[None], pixel_values_videos=torch.stack(own))[0]
            for prompt, own in zip(prompts, (videos[:1], videos[1:]))
        ]
        assert rows == alone
        assert rows[0][0] != rows[1][0]
        assert all(len(places) == round(0.2 * 96) for row in rows for places in row)

    def test_it_is_what_is_most_like_any_token_of_the_text(self, model):
        prompt = make_prompt(3, "video:6", 8, seed=40)
        with torch.no_grad():
            text = model.get_input_embeddings()(torch.cat([prompt[:3], prompt[-8:]]))
            features = model.get_video_features(VIDEO[None]).pooler_output[0][:-1]
        settings = QUESTION | {"similarity_threshold": 1.0}
        with torch.no_grad():
            merged = model(input_ids=prompt[None], pixel_values_videos=VIDEO[None], holitom_config=settings)
        best = [float(torch.cosine_similarity(token[None], text).max()) for token in features]
        expected = sorted(sorted(range(96), key=lambda i: -best[i])[: round(0.2 * 96)])
        assert merged.merged_videos[0][0].place.tolist() == expected

    def test_what_repeats_comes_last(self, model):
        still = VIDEO[:1].repeat(6, 1, 1, 1)
        [[places]] = self.places(model, input_ids=make_prompt(3, "video:6", 8)[None], pixel_values_videos=still[None])
        assert places[:16] == list(range(16))  # the first frame whole, then repetitions
