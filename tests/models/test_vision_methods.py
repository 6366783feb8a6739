"""Frames and patches that are merged inside the tower, against towers that merge them one by one."""

import dataclasses
import math
from itertools import chain, islice, pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration
from holitom_hf.merging import frame_merging
from holitom_hf.merging.bipartite import merges_by_layer
from holitom_hf.merging.products import segmentation_flops
from holitom_hf.models.operations import importance_flops, packed_tower_flops, projector_flops
from holitom_hf.models.siglip import HoliTomSiglipVisionModel
from holitom_hf.models.vision_methods import VISION_ENCODERS

from ..conftest import IDENTITY, SMALL, make_prompt, make_video
from .test_vision_reuse import random_tower, random_video, still_video


CLOSE = {"atol": 5e-6, "rtol": 1e-5}


def encoded(tower, pixels, num_frames, settings, frames_at_once=1000, shared_from=None):
    """The plan, every hidden state at every place, and the parts."""
    wanted = set(range(len(tower.encoder.layers) + 1))
    with torch.no_grad():
        plan, parts = VISION_ENCODERS[settings.vision_method](
            tower, pixels.split(frames_at_once), num_frames, settings, wanted, frames_at_once, shared_from
        )
        parts = list(parts)
    return plan, [torch.cat([part.frames(index) for part in parts]) for index in sorted(wanted)], parts


@torch.no_grad()
def dense_states(tower: HoliTomSiglipVisionModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    hidden = [tower.embeddings(pixels)]
    for layer in tower.encoder.layers:
        hidden.append(layer(hidden[-1], None))
    return hidden


def frame_similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    return round(float(torch.cosine_similarity(first, second, dim=-1).mean()), 5)


def merge_segment(frames: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Frames that are left of a segment, and how many each is made of."""
    if len(frames) < 3:
        return frames, [1] * len(frames)
    middle, left, sizes = frames[1:-1], [frames[0]], [1]
    bar = frame_similarity(frames[0], frames[-1])
    pairs = [frame_similarity(one, other) for one, other in pairwise(middle)]
    index = 0
    while index < len(middle):
        later = pairs[index + 1 :]
        if index < len(pairs) and pairs[index] >= bar and (not later or pairs[index] >= later[0]):
            share = pairs[index] / (pairs[index] + later[0]) if later else 1.0
            left.append(share * middle[index] + (1 - share) * middle[index + 1])
            sizes.append(2)
        else:
            left.append(middle[index])
            sizes.append(1)
        index += sizes[-1]
    return [*left, frames[-1]], [*sizes, 1]


def merge_video(frames: list[torch.Tensor], threshold: float) -> tuple[list[torch.Tensor], list[int]]:
    segments, average = [[frames[0]]], 1.0
    for frame in frames[1:]:
        average = 0.9 * frame_similarity(segments[-1][0], frame) + 0.1 * average
        if average < threshold or len(segments[-1]) == 5:
            segments.append([])
            average = 1.0
        segments[-1].append(frame)
    merged = [merge_segment(segment) for segment in segments]
    return [frame for left, _ in merged for frame in left], [size for _, sizes in merged for size in sizes]


@torch.no_grad()
def one_video_with_merged_frames(tower, pixels, merge_after, threshold):
    """Hidden states at every place, and for every layer whether a frame goes into it."""
    frames = list(tower.embeddings(pixels))
    members = [[number] for number in range(len(frames))]
    hidden, goes_in = [torch.stack(frames)], []
    for index, layer in enumerate(tower.encoder.layers, 1):
        goes_in.append([any(number == one[0] for one in members) for number in range(len(pixels))])
        frames = [layer(frame[None], None)[0] for frame in frames]
        if index in merge_after:
            frames, sizes = merge_video(frames, threshold)
            waiting = iter(members)
            members = [list(chain(*islice(waiting, size))) for size in sizes]
        hidden.append(torch.stack([frame for frame, one in zip(frames, members) for _ in one]))
    return hidden, torch.tensor(goes_in)


@pytest.mark.parametrize("seed", range(8))
def test_merged_frames_equal_a_tower_that_goes_frame_by_frame(seed):
    tower = random_tower(seed, num_layers=7)
    num_frames = [[9, 1, 6], [16], [3, 13], [2]][seed % 4]
    videos = [random_video(number, seed + v, static_share=0.9) for v, number in enumerate(num_frames)]
    start, threshold = 1 + seed % 3, (0.3, 0.4)[seed // 4]
    settings = HoliTomConfig(vision_method="frames", vision_reuse_layer=start, vision_reuse_threshold=threshold)
    merge_after = {start, *(layer for layer in (3, 5) if layer > start)}  # importance is of the input of layer 7
    apart = [one_video_with_merged_frames(tower, video, merge_after, threshold) for video in videos]
    for frames_at_once in (1000, 3, 1):
        plan, found, parts = encoded(tower, torch.cat(videos), num_frames, settings, frames_at_once)
        assert torch.equal(plan.rows_by_layer, torch.cat([goes_in for _, goes_in in apart], 1) * 36)
        assert torch.equal(plan.is_computed, (plan.rows_by_layer[-1] > 0)[:, None].expand(-1, 36))
        for index, mine in enumerate(found):
            torch.testing.assert_close(mine, torch.cat([hidden[index] for hidden, _ in apart]), **CLOSE)
        for part in parts:
            for index in (6, 7):
                assert torch.equal(part.slots[index], part.slot)
    assert plan.rows_by_layer[-1].sum() < plan.rows_by_layer[0].sum() or num_frames == [2]


def test_similarity_of_frames_behind_each_other_is_that_of_every_pair(monkeypatch):
    states = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(0))
    for budget in (10**9, 8 * 24 * 2, 1):
        monkeypatch.setattr(frame_merging, "COMPARED_BYTES", budget)
        found = frame_merging.band_similarity(states, 3)
        for distance in range(4):
            for frame in range(9 - distance):
                expected = torch.cosine_similarity(states[frame], states[frame + distance], dim=-1).mean()
                torch.testing.assert_close(found[distance, frame], expected)


def test_of_a_still_video_few_frames_are_left():
    tower = random_tower(num_layers=7)
    pixels = random_video(1).expand(20, -1, -1, -1)
    settings = HoliTomConfig(vision_method="frames", vision_reuse_layer=1)
    plan, found, _ = encoded(tower, pixels, [20], settings)
    # Segments of five frames become four, their ends and two of the three between; then 16 = 5 + 5 + 5 + 1.
    assert (plan.rows_by_layer > 0).sum(1).tolist() == [20, 16, 16, 13, 13, 11, 11]
    torch.testing.assert_close(found[-1], dense_states(tower, pixels)[-1], **CLOSE)


@torch.no_grad()
def one_frame_with_merged_patches(tower, pixels, merges, merge=None):
    """Hidden states at every place, and the places that stay: token by token, `merges[l]` of them in layer l."""
    merge = merge or merge_tokens
    tokens = [(state, [place]) for place, state in enumerate(tower.embeddings(pixels[None])[0])]

    def at_every_place():
        hidden = torch.empty(36, 24)
        for state, places in tokens:
            hidden[places] = state
        return hidden

    hidden = [at_every_place()]
    for layer, num_merged in zip(tower.encoder.layers, merges, strict=True):
        attention = layer.self_attn
        normed = [layer.layer_norm1(state) for state, _ in tokens]
        keys = [attention.k_proj(one).view(3, 8) for one in normed]
        values = [attention.v_proj(one).view(3, 8) for one in normed]
        attended = []
        for (state, _), one in zip(tokens, normed):
            query, outputs = attention.q_proj(one).view(3, 8), []
            for head in range(3):
                scores = [query[head] @ key[head] / math.sqrt(8) for key in keys]
                weights = torch.stack(
                    [score.exp() * len(places) for score, (_, places) in zip(scores, tokens, strict=True)]
                )
                outputs.append(sum(w * value[head] for w, value in zip(weights / weights.sum(), values)))
            attended.append(state + attention.out_proj(torch.cat(outputs)))
        tokens = [(state, places) for state, (_, places) in zip(attended, tokens)]
        tokens = merge(tokens, [key.mean(0) for key in keys], num_merged)
        tokens = [(state + layer.mlp(layer.layer_norm2(state)), places) for state, places in tokens]
        hidden.append(at_every_place())
    return hidden, sorted(min(places) for _, places in tokens)


def merge_tokens(tokens, keys, num_merged):
    """Of the tokens at even numbers those most like one at an odd number go into it; the others come first."""
    if num_merged == 0:
        return tokens
    best = {}
    for a in range(0, len(tokens), 2):
        alike = {b: float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in range(1, len(tokens), 2)}
        best[a] = max(alike, key=alike.get)
        best[a] = (alike[best[a]], best[a])
    gone = sorted(best, key=lambda a: -best[a][0])[:num_merged]
    left = [tokens[a] for a in best if a not in gone]
    for b in range(1, len(tokens), 2):
        members = [tokens[b], *(tokens[a] for a in gone if best[a][1] == b)]
        places = [place for _, some in members for place in some]
        left.append((sum(len(some) * state for state, some in members) / len(places), places))
    return left


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("layer", "ratio", "shared_from"), [(1, 0.5, None), (2, 0.3, None), (1, 0.8, 2), (1, 0.01, 3)]
)
def test_merged_patches_equal_a_tower_that_goes_token_by_token(layer, ratio, shared_from, attention):
    tower = random_tower(layer, num_layers=5, attn_implementation=attention)
    pixels = torch.cat([random_video(2, 1), random_video(1, 2)])
    settings = HoliTomConfig(vision_method="tome", vision_reuse_layer=layer, vision_retention_ratio=ratio)
    merges = {0.5: [0, 6, 6, 6, 0], 0.3: [0, 0, 13, 11, 0], 0.8: [0, 7, 0, 0, 0], 0.01: [0, 18, 9, 0, 0]}[ratio]
    plan, found, parts = encoded(tower, pixels, [2, 1], settings, 2, shared_from)
    for frame in range(3):
        hidden, places = one_frame_with_merged_patches(tower, pixels[frame], merges)
        for mine, theirs in zip(found, hidden, strict=True):
            torch.testing.assert_close(mine[frame], theirs, **CLOSE)
        assert plan.is_computed[frame].nonzero()[:, 0].tolist() == places
    expected = [36 - sum(merges[:number]) for number in range(5)]
    assert torch.equal(plan.rows_by_layer, torch.tensor(expected)[:, None].expand(5, 3))
    for part in parts:
        for index in range(shared_from or 4, 6):
            assert torch.equal(part.slots[index], part.slot)


@pytest.mark.parametrize(
    ("num_patches", "num_layers", "ratio", "expected"),
    [
        (36, 4, 0.5, [5, 5, 5, 3]),
        (729, 20, 0.5, [19] * 19 + [4]),
        (36, 3, 1.0, [0, 0, 0]),
        (36, 2, 0.1, [16, 10]),
        (9, 1, 0.5, [4]),
        (2, 3, 0.1, [1, 0, 0]),
    ],
)
def test_the_same_number_is_merged_in_every_layer_until_the_share_is_left(num_patches, num_layers, ratio, expected):
    assert merges_by_layer(num_patches, num_layers, ratio) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"vision_method": "frames", "vision_reuse_threshold": 1.0},
        {"vision_method": "tome", "vision_retention_ratio": 1.0},
        {"vision_method": "dymu", "vision_merge_thresholds": [1.0, 1.0]},
        {"vision_method": "reuse", "vision_reuse_threshold": 1.0},
    ],
)
def test_settings_that_leave_nothing_out_are_the_dense_tower(fields):
    tower = random_tower(num_layers=5)
    pixels = random_video(7)
    plan, found, _ = encoded(tower, pixels, [7], HoliTomConfig(vision_reuse_layer=2, **fields))
    for mine, theirs in zip(found, dense_states(tower, pixels), strict=True):
        assert torch.equal(mine, theirs)
    assert plan.is_computed.all()
    assert torch.equal(plan.rows_by_layer, torch.full((5, 7), 36))


def test_rows_by_layer_of_reuse_are_all_and_then_what_is_computed():
    settings = HoliTomConfig(vision_reuse_layer=2, vision_reuse_threshold=0.9)
    plan, _, _ = encoded(random_tower(num_layers=5), random_video(9, static_share=0.9), [9], settings)
    computed = plan.is_computed.sum(1)
    assert torch.equal(plan.rows_by_layer, torch.stack([torch.full((9,), 36)] * 2 + [computed] * 3))
    assert computed.sum() < 9 * 36


FIELDS = [
    {"vision_method": "frames", "vision_reuse_layer": 1, "vision_reuse_threshold": 0.5},
    {"vision_method": "tome", "vision_reuse_layer": 1},
    {"vision_method": "dymu", "vision_reuse_layer": 1, "vision_merge_thresholds": [0.6]},
    {"vision_method": "reuse", "vision_reuse_layer": 1, "vision_reuse_threshold": 0.8},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_two_videos_are_each_as_alone(model, fields):
    settings = model.config.holitom_config.overlaid(fields)
    videos = [make_video(7, seed=1), make_video(5, seed=2)]
    with torch.inference_mode():
        both = model.get_video_features(videos, holitom_config=settings, return_dict=True)
        for v, video in enumerate(videos):
            alone = model.get_video_features([video], holitom_config=settings, return_dict=True)
            torch.testing.assert_close(both.pooler_output[v], alone.pooler_output[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(both.importance[v], alone.importance[0], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(both.attention_keys[v], alone.attention_keys[0], atol=1e-5, rtol=1e-4)
            assert torch.equal(both.computed_patches[v], alone.computed_patches[0])
            assert torch.equal(both.rows_by_layer[v], alone.rows_by_layer[0])


@pytest.mark.parametrize("fields", FIELDS)
def test_features_and_importance_come_at_full_length(model, fields):
    video = make_video(8, seed=3, num_scenes=1, change=0.02)
    settings = model.config.holitom_config.overlaid(fields)
    with torch.inference_mode():
        found = model.get_video_features([video], holitom_config=settings, return_dict=True)
        bare = model.get_video_features([video], holitom_config=settings, return_dict=True, return_vision_states=False)
        dense = model.get_video_features([video], return_dict=True)
    assert found.pooler_output[0].shape == dense.pooler_output[0].shape
    assert found.importance[0].shape == (8, 16)
    # A mean over queries of what sums to 1 over keys.
    torch.testing.assert_close(found.importance[0].sum(1), torch.full((8,), 0.25), atol=1e-5, rtol=0)
    assert dense.computed_patches is dense.rows_by_layer is None
    assert found.computed_patches[0].shape == (8, 64)
    assert found.rows_by_layer[0].shape == (3, 8)
    assert found.rows_by_layer[0][0].tolist() == [64] * 8
    assert found.rows_by_layer[0][-1].tolist() == found.computed_patches[0].sum(1).tolist()
    assert found.rows_by_layer[0][-1].sum() < 8 * 64
    torch.testing.assert_close(found.hidden_states[-1].shape, dense.hidden_states[-1].shape)
    assert torch.equal(bare.pooler_output[0], found.pooler_output[0])
    assert torch.equal(bare.importance[0], found.importance[0])


@pytest.mark.parametrize("fields", FIELDS)
def test_features_of_several_layers_share_their_rows(fields):
    torch.manual_seed(0)
    config = HoliTomLlavaOnevisionConfig(
        **SMALL, vision_feature_layer=[-2, -1], holitom_config=IDENTITY.overlaid(fields)
    )
    model = HoliTomLlavaOnevisionForConditionalGeneration(config).eval().model
    with torch.inference_mode():
        found = model.get_video_features([make_video(6, seed=7, change=0.02)], output_hidden_states=True)
        projected = model.multi_modal_projector(torch.cat(found.hidden_states[-2:], dim=-1))
        expected = model.apply_pooling(projected).flatten(0, 1)
    torch.testing.assert_close(found.pooler_output[0][:-1], expected, **CLOSE)


def test_importance_of_merged_patches_is_that_of_as_many_equal_ones(model):
    """Against the tower's last layer over hidden states at full length."""
    settings = model.config.holitom_config.overlaid({"vision_method": "tome", "vision_reuse_layer": 1})
    with torch.inference_mode():
        found = model.get_video_features(
            [make_video(4, seed=5)], holitom_config=settings, output_hidden_states=True, return_dict=True
        )
        layer = model.model.vision_tower.encoder.layers[-1]
        torch.testing.assert_close(layer(found.hidden_states[-2], None), found.hidden_states[-1], **CLOSE)


@pytest.mark.parametrize("fields", FIELDS)
def test_it_generates_from_end_to_end_and_with_beams(model, fields):
    inputs = {
        "input_ids": make_prompt(3, "video:6", 4)[None],
        "pixel_values_videos": make_video(6, seed=4)[None],
        "holitom_config": fields,
        "max_new_tokens": 4,
        "do_sample": False,
    }
    with torch.inference_mode():
        greedy = model.generate(**inputs)
        beams = model.generate(**inputs, num_beams=3)
        again = model.generate(**inputs)
    assert torch.equal(greedy, again)
    assert greedy.shape[1] == inputs["input_ids"].shape[1] + 4 == beams.shape[1]


def test_generation_without_merging_is_that_of_the_dense_tower(model):
    inputs = {
        "input_ids": make_prompt(3, "video:6", 4)[None],
        "pixel_values_videos": make_video(6, seed=4)[None],
        "max_new_tokens": 6,
        "do_sample": False,
    }
    with torch.inference_mode():
        expected = model.generate(**inputs)
        for fields in (
            {"vision_method": "frames", "vision_reuse_layer": 1, "vision_reuse_threshold": 1.0},
            {"vision_method": "tome", "vision_reuse_layer": 1, "vision_retention_ratio": 1.0},
            {"vision_method": "dymu", "vision_reuse_layer": 1, "vision_merge_thresholds": [1.0]},
        ):
            assert torch.equal(model.generate(**inputs, holitom_config=fields), expected)


def test_settings_are_checked(model):
    with pytest.raises(ValueError, match="vision_method must be one of 'reuse', 'frames', 'tome', 'dymu', got 'both'"):
        HoliTomConfig(vision_method="both")
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="vision_retention_ratio must be a number with 0 < R <= 1"):
            HoliTomConfig(vision_retention_ratio=ratio)
    with pytest.raises(TypeError, match="vision_retention_ratio must be a number"):
        HoliTomConfig(vision_retention_ratio="half")
    video = [make_video(2, seed=0)]
    for method, layer, choice in (("frames", 3, "choose 1 to 2"), ("tome", 2, "choose 1 to 1")):
        fields = {"vision_method": method, "vision_reuse_layer": layer}
        with pytest.raises(ValueError, match=f"vision_reuse_layer is {layer}, but .*{choice}"):
            model.get_video_features(video, holitom_config=fields)


def test_patches_that_count_several_times_need_attention_that_takes_a_mask():
    tower = random_tower(num_layers=4)
    tower.config._attn_implementation = "flash_attention_2"
    tower.first_states = lambda chunks, start, wanted, kwargs: {start: torch.zeros(1, 36, 24)}
    settings = HoliTomConfig(vision_method="tome", vision_reuse_layer=1)
    with pytest.raises(ValueError, match="vision_method 'tome' adds to attention scores, which 'flash_attention_2'"):
        encoded(tower, random_video(1), [1], settings)


@pytest.mark.parametrize("method", ["reuse", "frames", "tome"])
def test_operations_of_a_tower_that_leaves_something_out(model, method):
    """The formulas against torch's counter over the tower, its projector and the importance."""
    settings = HoliTomConfig(vision_method=method, vision_reuse_layer=1, vision_reuse_threshold=0.9)
    pixels = still_video(1, seed=1).expand(1, 7, -1, -1, -1) if method == "frames" else still_video(7, seed=1)[None]

    def counted(**changes) -> int:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            counted.features = model.get_video_features(
                pixels, holitom_config=dataclasses.replace(settings, **changes), return_vision_states=False
            )
        return counter.get_total_flops()

    config, encoding = model.config, counted(outer_method="none")
    [rows] = counted.features.rows_by_layer
    assert rows.sum() < rows.numel() * 64
    tower = packed_tower_flops(config.vision_config, rows, method)
    if method == "reuse":  # torch counts products of all seven frames with all, of which those of neighbours are used
        tower += 64 * 2 * 32 * 7 * 7 - segmentation_flops(7, 64, 32)
    projector = projector_flops(config, 7, int(counted.features.computed_patches[0].sum()))
    assert encoding == tower + projector
    importance = importance_flops(config.vision_config, 7, int(rows[-1].sum()))
    assert counted() - encoding == importance
