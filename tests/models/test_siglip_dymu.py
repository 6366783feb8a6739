"""Patches merged by thresholds, against a tower that goes token by token; and how the thresholds are found."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig
from holitom_hf.apps.command_line.app import app
from holitom_hf.merging.dynamic_matching import best_partners, threshold_of
from holitom_hf.models.operations import packed_tower_flops
from holitom_hf.models.siglip_dymu import find_thresholds
from holitom_hf.models.token_groups import token_groups

from ..conftest import SMALL, make_prompt, make_video
from .test_vision_methods import CLOSE, encoded, merge_tokens, one_frame_with_merged_patches
from .test_vision_reuse import random_tower, random_video


def settings_with(thresholds, layer=1, **fields):
    return HoliTomConfig(vision_method="dymu", vision_reuse_layer=layer, vision_merge_thresholds=thresholds, **fields)


def merge_above(tokens, keys, threshold):
    """The tokens at even numbers whose best at an odd number is above the threshold go into it."""
    if threshold is None or len(tokens) < 2:
        return tokens
    best = [
        max(float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in range(1, len(tokens), 2))
        for a in range(0, len(tokens), 2)
    ]
    return merge_tokens(tokens, keys, sum(score > threshold for score in best))


@pytest.mark.parametrize(
    ("layer", "thresholds", "shared_from", "attention"),
    [(1, [0.3, 0.7, -0.2], None, "sdpa"), (2, [0.6, 0.7], None, "eager"), (1, [-1.0, -1.0], 3, "sdpa")],
)
def test_patches_above_the_threshold_are_merged_as_in_a_tower_that_goes_token_by_token(
    layer, thresholds, shared_from, attention
):
    tower = random_tower(layer, num_layers=5, attn_implementation=attention)
    pixels = torch.cat([random_video(2, 1), random_video(1, 2)])
    plan, found, parts = encoded(tower, pixels, [2, 1], settings_with(thresholds, layer), 2, shared_from)
    by_layer = [None] * layer + thresholds
    by_layer += [None] * (5 - len(by_layer))
    for frame in range(3):
        hidden, places = one_frame_with_merged_patches(tower, pixels[frame], by_layer, merge_above)
        for mine, theirs in zip(found, hidden, strict=True):
            torch.testing.assert_close(mine[frame], theirs, **CLOSE)
        assert plan.is_computed[frame].nonzero()[:, 0].tolist() == places
        assert plan.groups[frame].unique().tolist() == places
        assert int(plan.rows_by_layer[-1, frame]) == len(places) < 36
        # Places of one group have one state.
        assert torch.equal(found[-1][frame], found[-1][frame][plan.groups[frame]])
    if thresholds[0] > -1:
        assert len(set(plan.rows_by_layer[-1].tolist())) > 1
    for part in parts:
        for index in range(shared_from or 4, 6):
            assert torch.equal(part.slots[index], part.slot)


def test_partners_of_frames_with_padding_are_those_of_each_frame_alone():
    keys = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    counts = [9, 4, 1]
    is_real = torch.arange(9) < torch.tensor(counts)[:, None]
    scores, partner = best_partners(keys, is_real)
    for frame, count in enumerate(counts):
        for place in range(0, 9, 2):
            alike = [
                float(torch.cosine_similarity(keys[frame, place], keys[frame, b], dim=0)) for b in range(1, count, 2)
            ]
            if place < count and alike:
                assert float(scores[frame, place // 2]) == pytest.approx(max(alike), abs=1e-6)
                assert int(partner[frame, place // 2]) == alike.index(max(alike))
            else:
                assert scores[frame, place // 2] == -torch.inf


def test_so_many_scores_lie_above_a_threshold_as_were_asked_for():
    scores = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    scores[1, 3:] = -torch.inf
    for number in (1, 7, 20):
        assert int((scores > threshold_of(scores, number)).sum()) == number
    assert threshold_of(scores, 0) == 1.0
    assert threshold_of(scores - 2, 5) == 0.0  # DyMU merges nothing that points away


def test_thresholds_leave_the_share_that_was_asked_for_and_nearly_that_of_other_frames():
    tower = random_tower(num_layers=6)
    share = HoliTomConfig(vision_reuse_layer=1, vision_retention_ratio=0.5)
    pixels = random_video(60, seed=3)
    thresholds = find_thresholds(tower, pixels.split(25), share, 5)
    # 36 patches: 5 are merged in each of 4 layers, 3 in the last.
    assert len(thresholds) == 4
    plan, _, _ = encoded(tower, pixels, [60], settings_with(thresholds))
    assert plan.rows_by_layer.sum(1).tolist() == [36 * 60, 36 * 60, 31 * 60, 26 * 60, 21 * 60, 18 * 60]
    counts = plan.rows_by_layer[-1]
    assert counts.min() < 18 < counts.max()
    other, _, _ = encoded(tower, random_video(200, seed=4), [200], settings_with(thresholds))
    assert other.rows_by_layer[-1].float().mean() / 36 == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(find_thresholds(tower, pixels.split(60), share, 5), thresholds, atol=1e-5, rtol=0)


def test_simple_frames_keep_fewer_patches():
    tower = random_tower(num_layers=5)
    plain = torch.zeros(1, 3, 24, 24) + 0.01 * torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    plan, _, _ = encoded(tower, torch.cat([plain, noise]), [2], settings_with([0.9, 0.9, 0.9]))
    assert plan.rows_by_layer[-1, 0] < plan.rows_by_layer[-1, 1]


@pytest.mark.parametrize("pooling", ["bilinear", "average", "max"])
@pytest.mark.parametrize("side", [5, 6])
def test_pooled_tokens_are_equal_whose_patches_are_all_of_one_group(pooling, side):
    """A grid of which the upper half is one group, but for two corners."""
    functional, small = torch.nn.functional, -(-side // 2)

    def apply_pooling(patches):
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if pooling == "bilinear":
            pooled = functional.interpolate(grid, size=(small, small), mode="bilinear")
        else:
            pooled = (functional.avg_pool2d if pooling == "average" else functional.max_pool2d)(grid, 2)
        return pooled.permute(0, 2, 3, 1).flatten(1, 2)

    groups = torch.arange(side * side).repeat(2, 1)
    groups[0, 1 : 4 * side] = 1
    rows = torch.randn(2, side * side, 7, generator=torch.Generator().manual_seed(0))
    features = apply_pooling(rows.gather(1, groups[..., None].expand(-1, -1, 7)))
    found = token_groups(apply_pooling, groups)
    num_tokens = features.shape[1]
    for frame in range(2):
        for token in range(num_tokens):
            close = (features[frame] - features[frame, token]).abs().amax(-1) < 1e-5
            assert int(found[frame, token]) == int(close.nonzero()[0])
    assert len(found[0].unique()) < num_tokens == len(found[1].unique())


def test_operations_are_those_that_torch_counts():
    """Of one frame, which needs no filling up, and of which something is merged in every layer that merges."""
    tower = random_tower(num_layers=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plan, _, _ = encoded(tower, random_video(1), [1], settings_with([0.3, 0.3]))
    assert len(set(plan.rows_by_layer[1:, 0].tolist())) == 3
    assert counter.get_total_flops() == packed_tower_flops(tower.config, plan.rows_by_layer, "dymu")


def test_without_thresholds_or_with_others_it_is_refused(model):
    video = [make_video(2, seed=0)]
    fields = {"vision_method": "dymu", "vision_reuse_layer": 1}
    with pytest.raises(
        ValueError, match="needs vision_merge_thresholds: find them with `holitom-hf calibrate-vision`"
    ):
        model.get_video_features(video, holitom_config=fields)
    with pytest.raises(ValueError, match=r"vision_merge_thresholds has 2 numbers, but .* merges in 1 layers"):
        model.get_video_features(video, holitom_config=fields | {"vision_merge_thresholds": [0.5, 0.5]})
    for value, error in (((0.5,), TypeError), ("half", TypeError), (["half"], TypeError), ([0, 1.5], ValueError)):
        with pytest.raises(error, match="vision_merge_thresholds must be"):
            HoliTomConfig(vision_merge_thresholds=value)
    tower = random_tower(num_layers=4)
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="vision_method 'dymu' adds to attention scores, which 'flash_attention_2'"):
        encoded(tower, random_video(1), [1], settings_with([0.5, 0.5]))


def test_thresholds_travel_with_the_configuration(tmp_path):
    config = HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=settings_with([0.25, 0.75]))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["holitom_config"]
    assert saved["vision_merge_thresholds"] == [0.25, 0.75]
    again = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path).holitom_config
    assert again == config.holitom_config


def test_what_the_tower_made_equal_is_one_token_of_the_decoder(model):
    """Patches so alike that whole tokens are equal: the decoder gets each once, and they are what they were."""
    video = make_video(2, seed=3) * 0 + 0.001 * make_video(2, seed=3)
    fields = {"vision_method": "dymu", "vision_reuse_layer": 1, "vision_merge_thresholds": [-1.0]}
    settings = model.config.holitom_config.overlaid(
        fields | {"outer_method": "dymu_tokens", "retention_ratio": 0.9, "inner_method": "none"}
    )
    with torch.inference_mode():
        features = model.get_video_features([video], holitom_config=settings, return_dict=True)
        [tokens] = model.model.video_tokens(features)
        output = model(
            input_ids=make_prompt(3, "video:2", 4)[None],
            mm_encoder_outputs={"video": features},
            holitom_config=settings,
        )
    [[merged]] = output.merged_videos
    equal = tokens.groups == torch.arange(tokens.groups.shape[1])
    assert merged.num_tokens <= max(int(equal.sum()), round(0.9 * tokens.groups.numel()))
    torch.testing.assert_close(tokens.features[0][tokens.groups[0]], tokens.features[0], atol=1e-5, rtol=1e-4)


def test_the_command_writes_settings_that_the_tower_takes(tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["questions", str(tmp_path / "clips"), "--num-questions", "3", "--side", "112"])
    assert result.exit_code == 0, result.output
    clips = sorted(str(file) for file in (tmp_path / "clips").iterdir() if file.suffix != ".jsonl")
    arguments = ["calibrate-vision", str(tmp_path / "out"), "--frames", "4", "--vision-retention-ratio", "0.4"]
    result = runner.invoke(app, [*arguments, "--videos", *clips])
    assert result.exit_code == 0, result.output
    assert "take it with --preset" in result.output
    settings = HoliTomConfig.from_pretrained(tmp_path / "out")
    assert (settings.vision_method, settings.vision_reuse_layer, settings.vision_retention_ratio) == ("dymu", 1, 0.4)
    assert len(settings.vision_merge_thresholds) == 2
    answer = runner.invoke(
        app, ["answer", clips[0], "What is it?", "--preset", str(tmp_path / "out"), "--max-new-tokens", "2", "--json"]
    )
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.output)["computed_patches"] < 0.7
