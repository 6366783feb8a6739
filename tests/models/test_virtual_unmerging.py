"""Tokens at all places that they stand for, against upstream's decoder layers over the full sequence."""

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.merging import MergingSettings
from holitom_hf.merging.tensors import merge_tokens
from holitom_hf.models.upstream import CACHE_NAME, cache_of
from holitom_hf.models.virtual_unmerging import Unmerging, mean_over_places
from holitom_hf.sequence.inner_stage import InnerStage
from holitom_hf.sequence.packed_rows import PackedRows

from ..conftest import VIDEO_TOKEN, make_prompt, make_video, pad_batch


VIDEO = make_video(6, seed=41)
PURE = {"outer_method": "dymu_tokens", "retention_ratio": 0.2, "inner_method": "none", "virtual_unmerging": True}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@torch.no_grad()
def plain_logits(model, upstream, prompt, video, fields):
    """
    Upstream's layers over the whole prompt, in which every token of a group has the group's state: repeated before the
    first layer, and averaged behind every attention. Group by group, with the mask written out.
    """
    settings = model.config.holitom_config.overlaid(fields)
    features = model.get_video_features(video[None], holitom_config=settings)
    [tokens] = model.model.video_tokens(features)
    merged = merge_tokens(tokens, MergingSettings(**{k: v for k, v in fields.items() if k != "virtual_unmerging"}))
    placeholders = (prompt == VIDEO_TOKEN).nonzero()[:, 0].tolist()
    hidden = upstream.get_input_embeddings()(prompt).clone()
    groups, gone = [], []
    assigned = merged.assignment.flatten().tolist()
    for output in range(merged.num_tokens):
        groups.append([placeholders[token] for token, other in enumerate(assigned) if other == output])
        hidden[groups[-1]] = merged.embeddings[output]
    gone = [placeholders[token] for token, other in enumerate(assigned) if other < 0]
    hidden[placeholders[-1]] = model.model.image_newline
    left = [place for place in range(len(prompt)) if place not in gone]
    groups = [[left.index(place) for place in group] for group in groups]
    hidden = hidden[left][None]
    number = len(left)
    positions = torch.arange(number)[None] if settings.position_ids == "packed" else torch.tensor([left])
    decoder = upstream.model.language_model
    rotation = decoder.rotary_emb(hidden, positions)
    mask = torch.full((number, number), -torch.inf).triu(1)[None, None]
    for layer in decoder.layers:
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), rotation, mask)
        for group in groups:
            attended[0, group] = attended[0, group].mean(0)
        hidden = hidden + attended
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = torch.full((len(prompt), 120), torch.nan)
    logits[left] = upstream.lm_head(decoder.norm(hidden))[0]
    return logits, (prompt != VIDEO_TOKEN)


CASES = [
    PURE,
    PURE | {"position_ids": "kept"},
    PURE | {"outer_method": "temporal_pooling", "retention_ratio": 0.34},
    PURE | {"outer_method": "holitom", "retention_ratio": 0.3},  # merges some and drops others
    PURE | {"outer_method": "random_tokens", "retention_ratio": 0.3, "position_ids": "kept"},  # merges none
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: f"{fields['outer_method']}")
def test_logits_are_those_of_upstreams_layers_over_the_full_sequence(model, upstream, fields):
    prompt = make_prompt(3, "video:6", 8, seed=40)
    expected, is_text = plain_logits(model, upstream, prompt, VIDEO, fields)
    with torch.no_grad():
        output = model(prompt[None], pixel_values_videos=VIDEO[None], holitom_config=fields)
    torch.testing.assert_close(output.logits[0][is_text], expected[is_text], **CLOSE)
    with torch.no_grad():
        without = model(
            prompt[None], pixel_values_videos=VIDEO[None], holitom_config=fields | {"virtual_unmerging": False}
        )
    merges = fields["outer_method"] != "random_tokens"
    assert ((output.logits - without.logits)[0, -1].abs().max() > 1e-3) == merges


def test_where_none_is_merged_the_model_is_the_plain_one(model, upstream):
    """At a ratio that leaves every token."""
    prompt = make_prompt(3, "video:6", 8, seed=40)[None]
    fields = PURE | {"retention_ratio": 0.999}
    with torch.no_grad():
        logits = model(prompt, pixel_values_videos=VIDEO[None], holitom_config=fields).logits
        torch.testing.assert_close(logits, upstream(prompt, pixel_values_videos=VIDEO[None]).logits, **CLOSE)


@pytest.mark.parametrize("position_ids", ["packed", "kept"])
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("method", ["dymu_tokens", "holitom"])
def test_it_goes_on_with_its_cache_as_without_one(model, position_ids, num_beams, method):
    inputs = {"input_ids": make_prompt(3, "video:6", 8, seed=40)[None], "pixel_values_videos": VIDEO[None]}
    settings = PURE | {"position_ids": position_ids, "outer_method": method}
    kwargs = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": 5, "holitom_config": settings}
    assert torch.equal(model.generate(**inputs, **kwargs), model.generate(**inputs, **kwargs, use_cache=False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_each_as_alone(model, side):
    prompts = [make_prompt(3, "video:6", 8, seed=1), make_prompt(6, "video:3", 2, seed=2)]
    videos = [VIDEO, make_video(3, seed=5)]
    ids, mask = pad_batch(prompts, side)
    with torch.no_grad():
        both = model(ids, attention_mask=mask, pixel_values_videos=videos, holitom_config=PURE)
        assert cache_of(both).get_seq_length() == max(map(len, prompts))  # nothing was dropped
        for row, (prompt, video) in enumerate(zip(prompts, videos)):
            alone = model(prompt[None], pixel_values_videos=video[None], holitom_config=PURE).logits[0]
            is_text = prompt != VIDEO_TOKEN
            found = both.logits[row][mask[row].bool()]
            torch.testing.assert_close(found[is_text], alone[is_text], **CLOSE)


def test_a_second_turn_with_another_video_is_as_in_one_pass(model):
    first, second = make_prompt(3, "video:6", 8, seed=1)[None], make_prompt(2, "video:3", 4, seed=2)[None]
    other = make_video(3, seed=5)
    settings = PURE | {"outer_method": "holitom", "retention_ratio": 0.3}
    with torch.no_grad():
        turn = model(first, pixel_values_videos=VIDEO[None], holitom_config=settings)
        turn = model(second, pixel_values_videos=other[None], holitom_config=settings, **{CACHE_NAME: cache_of(turn)})
        whole = model(torch.cat([first, second], 1), pixel_values_videos=[VIDEO, other], holitom_config=settings)
    torch.testing.assert_close(turn.logits[0, -4:], whole.logits[0, -4:], **CLOSE)


def test_members_at_one_place_make_it_proportional_attention(model):
    """Where all see all, n members at one position are what log n is at it."""
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 5, 32, generator=random)
    sizes = torch.tensor([[1, 4, 2, 1, 3], [2, 2, 1, 5, 1]])
    positions = torch.tensor([[0, 3, 7, 8, 20], [1, 2, 4, 9, 10]])
    index = torch.stack([torch.arange(5).repeat_interleave(row) for row in sizes])
    packed = PackedRows(index, torch.ones_like(index, dtype=torch.bool), [11, 11], "left", index)
    sees_all = {"full_attention": torch.zeros(2, 1, 11, 11)}
    decoder = model.model.language_model
    with torch.no_grad():
        unmerged = decoder(
            inputs_embeds=embeds,
            position_ids=positions.gather(1, index),
            attention_mask=sees_all,
            use_cache=False,
            inner_stage=InnerStage(None, has_gaps=True, unmerging=Unmerging(packed, index < 0, index)),
        )
        proportional = decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": sizes.log()[:, None, None].expand(-1, 1, 5, -1)},
            use_cache=False,
            inner_stage=InnerStage(None, has_gaps=True),
        )
    torch.testing.assert_close(unmerged.last_hidden_state, proportional.last_hidden_state, **CLOSE)


def test_means_over_places_leave_padding_out():
    values = torch.arange(8.0).view(1, 4, 2)
    found = mean_over_places(values, torch.tensor([[0, 2, 2, 2]]), torch.tensor([[True, True, True, False]]), 3)
    assert found.tolist() == [[[0, 1], [0, 0], [3, 4]]]


def test_what_it_cannot_do_is_refused(model):
    inputs = {"input_ids": make_prompt(3, "video:6", 8, seed=40)[None], "pixel_values_videos": VIDEO[None]}
    for fields, message in (
        ({"inner_method": "merge", "inner_merge_layer": 2}, 'set inner_method="none"'),
        ({"inner_method": "freeze", "skipped_layers": [2]}, 'set inner_method="none"'),
        ({"proportional_attention": True}, "proportional_attention would again"),
        ({"newline_position": "row"}, 'virtual_unmerging needs newline_position="end"'),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, holitom_config=PURE | fields)
    with pytest.raises(ValueError, match="layers are not recorded: leave output_hidden_states out"):
        model(**inputs, holitom_config=PURE, output_hidden_states=True)
    with pytest.raises(TypeError, match="virtual_unmerging must be True or False"):
        HoliTomConfig(virtual_unmerging="yes")
