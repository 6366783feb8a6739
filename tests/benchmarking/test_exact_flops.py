import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionForConditionalGeneration

from holitom_hf import HoliTomConfig
from holitom_hf.benchmarking.architectures import ARCHITECTURES, architecture, qwen_architecture
from holitom_hf.benchmarking.exact_flops import (
    clustering_flops,
    compare_flops,
    forward_flops,
    inner_merging_flops,
    plan_of,
    plan_video,
    segmentation_flops,
)
from holitom_hf.benchmarking.models import contest
from holitom_hf.benchmarking.synthetic import synthetic_features
from holitom_hf.merging import METHODS, merge_video_tokens
from holitom_hf.merging.flops import prefill_flops, tokens_by_layer
from holitom_hf.merging.inner import fold_tokens, most_similar
from holitom_hf.merging.segmentation import compare_by_products
from holitom_hf.merging.spatial import cluster_tokens
from holitom_hf.merging.tensors import merge_tokens
from holitom_hf.merging.video_tokens import VideoTokens
from holitom_hf.models.operations import decoder_flops, importance_flops
from holitom_hf.models.registry import backbone_class
from holitom_hf.models.vision_importance import vision_importance

from ..models import qwen


FRAMES = 3


@pytest.fixture(scope="module")
def game():
    config = architecture("tiny", HoliTomConfig(retention_ratio=0.2, similarity_threshold=0.65, inner_merge_layer=5))
    return contest(config, FRAMES, 1, torch.device("cpu"), torch.float32)


@torch.inference_mode()
def counted(function) -> float:
    # The counter knows no fused attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("ratio", "share", "share_without_inner"),
    [(0.25, 17.4, 21.4), (0.2, 13.8, 16.9), (0.15, 10.3, 12.5), (0.1, 6.8, 8.3)],
)
def test_the_papers_figures_for_7b_at_32_frames(ratio, share, share_without_inner):
    text = architecture("7b").text_config
    size, depth = (text.hidden_size, text.intermediate_size), text.num_hidden_layers
    full = prefill_flops([6272] * depth, *size)
    assert round(full / 1e12, 1) == 40.8
    kept = 6272 * ratio
    for layer, expected in ((18, share), (None, share_without_inner)):
        flops = prefill_flops(tokens_by_layer(kept, kept / 2, layer, depth), *size)
        assert 100 * flops / full == pytest.approx(expected, abs=0.06)


def test_the_plain_model_has_the_operations_that_torch_counts(game):
    config = game.models["holitom"].config
    settings = HoliTomConfig(outer_method="none", inner_method="none")
    num_text = game.input_ids.shape[1] - FRAMES * 196 - 1
    expected = forward_flops(config, FRAMES, num_text, plan_video(settings, FRAMES, 196), settings)
    assert counted(lambda: game.models["plain"](**game.inputs(), logits_to_keep=1)) == expected.total
    assert expected.own == 0


def test_the_compressed_model_has_the_operations_that_torch_counts(game):
    model = game.models["holitom"]
    num_text = game.input_ids.shape[1] - FRAMES * 196 - 1
    plan = plan_video(model.config.holitom_config, FRAMES, 196, static_share=0.6)
    expected = forward_flops(model.config, FRAMES, num_text, plan)
    merged = model(**game.inputs()).merged_videos[0][0]
    assert merged.segments == [(0, FRAMES)]
    assert abs(merged.num_tokens - plan.num_tokens) <= 4  # some synthetic tokens are a little less alike than others
    total = counted(lambda: model(**game.inputs(), logits_to_keep=1))
    assert total == pytest.approx(expected.total, rel=0.01)
    assert total < 0.7 * counted(lambda: game.models["plain"](**game.inputs(), logits_to_keep=1))


def test_a_tower_that_leaves_patches_out_has_the_operations_that_torch_counts(game):
    """Of the contest's pixels 60 % repeat over three frames: 1 - 0.6 * 2 / 3 are computed after the decision."""
    model = game.models["holitom"]
    num_text = game.input_ids.shape[1] - FRAMES * 196 - 1
    settings = replace(model.config.holitom_config, vision_reuse_layer=1)
    plan = plan_video(settings, FRAMES, 196, static_share=0.6)
    expected = forward_flops(model.config, FRAMES, num_text, plan, settings, computed_share=0.6)
    total = counted(lambda: model(**game.inputs(), logits_to_keep=1, holitom_config=settings))
    assert total == pytest.approx(expected.total, rel=0.01)
    whole = forward_flops(model.config, FRAMES, num_text, plan, settings, computed_share=1.0)
    without = forward_flops(model.config, FRAMES, num_text, plan)
    assert whole.projector == without.projector
    assert whole.importance == without.importance
    assert 0 < whole.vision_tower - without.vision_tower < 1e-3 * without.vision_tower  # what decides


def test_what_holitom_adds_has_the_operations_that_torch_counts(game):
    model = game.models["holitom"]
    vision, text = model.config.vision_config, model.config.text_config
    hidden = torch.randn(2, 729, vision.hidden_size)
    layer = model.model.vision_tower.encoder.layers[-1]
    assert counted(lambda: vision_importance(layer, hidden)) == importance_flops(vision, 2)
    tokens = torch.randn(2, 30, 64)
    clusters = counted(lambda: cluster_tokens(tokens, [30, 30], [5, 5], 7, 0.6))
    assert clusters == clustering_flops([30, 30], [5, 5], 64)
    # Two frames at once are multiplied 2x2: the product of the second with the first is the only one too many.
    compared = counted(lambda: compare_by_products(synthetic_features(2, 16, 64)))
    assert compared == segmentation_flops(2, 16, 64) + 2 * 64 * 16
    kept, folded = torch.arange(0, 10), torch.arange(10, 26)
    tokens = torch.randn(26, text.hidden_size)
    fold = counted(lambda: fold_tokens(tokens, kept, folded, most_similar(tokens, kept, folded)))
    query = inner_merging_flops(text, 40, [(10, 16)], is_folding=False)
    assert fold == inner_merging_flops(text, 40, [(10, 16)], is_folding=True) - query


# Those of HoliTom's own stages depend on the video, and so do those of DyMU's rounds.
DEPENDING = ("holitom", "holitom_stop", "dymu_tokens")
OTHERS = [name for name, m in METHODS.items() if m.group != "ablation" and name not in DEPENDING]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.6])
def test_other_methods_have_the_operations_that_torch_counts(name, ratio):
    random = torch.Generator().manual_seed(0)
    sizes = ((9, 25, 24), (9, 25, 8), (5, 24), (9, 25))
    features, keys, question, importance = (torch.randn(size, generator=random) for size in sizes)
    video = VideoTokens(features, importance.exp(), keys, question=question)
    settings = HoliTomConfig(outer_method=name, retention_ratio=ratio, similarity_threshold=1.0)
    method = METHODS[name]
    expected = method.flops(video, settings) if method.flops else 0.0
    assert counted(lambda: merge_tokens(video, settings)) == expected
    assert bool(expected) == (method.flops is not None) or name == "visionzip"  # which has no targets of one token


@pytest.mark.parametrize("name", ["farthest_points", "question_tokens"])
def test_leaving_repeats_out_costs_stage_1s_products(name):
    video = VideoTokens(synthetic_features(2, 16, 24), question=torch.randn(5, 24))
    settings = HoliTomConfig(outer_method=name, retention_ratio=0.5, similarity_threshold=0.8)
    # Two frames at once are multiplied 2x2, which is one product too many.
    total = METHODS[name].flops(video, settings) + 2 * 24 * 16
    assert counted(lambda: merge_tokens(video, settings)) == total


def test_farthest_points_in_the_model_have_the_operations_that_torch_counts(game):
    model = game.models["holitom"]
    settings = HoliTomConfig.from_preset("farthest-points-r10")
    num_text = game.input_ids.shape[1] - FRAMES * 196 - 1
    plan = plan_video(settings, FRAMES, 196)
    expected = forward_flops(model.config, FRAMES, num_text, plan, settings)
    assert expected.own == expected.choosing > 0
    assert counted(lambda: model(**game.inputs(), holitom_config=settings, logits_to_keep=1)) == expected.total


@pytest.mark.parametrize("method", ["none", "farthest_points", "holitom"])
@pytest.mark.parametrize("family", qwen.FAMILIES.values(), ids=qwen.FAMILIES)
def test_qwens_have_the_operations_that_torch_counts(family, method):
    """Of 20 x 36 patches, so that windows of Qwen2.5-VL's are cut off at both edges."""
    if method == "none":
        settings = HoliTomConfig(outer_method="none", inner_method="none")
    elif method == "holitom":  # nothing repeats: the numbers that remain are known
        settings = HoliTomConfig(retention_ratio=0.3, similarity_threshold=1.0, inner_merge_layer=2)
    else:
        settings = replace(HoliTomConfig.from_preset("farthest-points-r15"), retention_ratio=0.3)
    torch.manual_seed(0)
    config = family.ours("Config")(**family.values, holitom_config=settings)
    # Experts one after another: not those of tokens that are none.
    model = family.generation._from_config(config, experts_implementation="eager").eval()
    grid, num_frames = (3, 20, 36), 6
    prompt = family.prompt(3, grid, 8)
    inputs = qwen.inputs_of([prompt], [qwen.video(grid, 1)])
    num_video = int((prompt == qwen.VIDEO).sum())
    plan = plan_video(settings, 3, 180, static_share=0.0, scene_frames=3)
    expected = forward_flops(model.config, num_frames, len(prompt) - num_video, plan, settings, size=(80, 144))
    total = counted(lambda: model(**inputs, logits_to_keep=1))
    if method == "holitom":  # three frames are multiplied with each other, two products too many for each token
        assert total == pytest.approx(expected.total, rel=0.01)
        assert expected.importance > 0
    else:
        assert total == expected.total
    with pytest.raises(ValueError, match="multiples of 8"):
        forward_flops(model.config, num_frames, 9, plan, settings, size=(80, 100))


class TestLlavaVideo:
    """27 patches along a side, 13 tokens, a newline after each row that has a token."""

    FRAMES = 6

    @pytest.fixture(scope="class")
    def game(self):
        settings = HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.65, inner_merge_layer=5)
        return contest(architecture("llava-video-small", settings), self.FRAMES, 1, torch.device("cpu"), torch.float32)

    @pytest.mark.parametrize(
        ("method", "is_exact"),
        [("none", True), ("farthest_points", True), ("visionzip", True), ("random_tokens", True), ("holitom", False)],
    )
    @pytest.mark.parametrize("inner", ["none", "merge"])
    def test_it_has_the_operations_that_torch_counts(self, game, method, is_exact, inner):
        """With as many newlines as the video turned out to have; HoliTom multiplies frames with others, too."""
        model, num_text = game.models["holitom"], game.input_ids.shape[1] - self.FRAMES * 13 * 14
        settings = replace(model.config.holitom_config, outer_method=method, inner_method=inner)
        if method != "holitom":
            settings = replace(settings, similarity_threshold=1.0)  # else stage 1's products are theirs, too
        outputs = []
        total = counted(lambda: outputs.append(model(**game.inputs(), logits_to_keep=1, holitom_config=settings)))
        merged = outputs[0].merged_videos
        plan = plan_video(settings, self.FRAMES, 169) if method == "none" else plan_of(merged[0][0])
        rows = self.FRAMES * 13
        if method == "none":
            assert (plan.num_tokens, plan.num_newlines or rows) == (self.FRAMES * 169, rows)
        elif method == "visionzip":  # which leaves rows without a token their newline
            assert plan.num_newlines == rows
        else:
            assert 0 < plan.num_newlines < rows
        expected = forward_flops(model.config, self.FRAMES, num_text, plan, settings).total
        assert total == expected if is_exact else total == pytest.approx(expected, rel=1e-3)

    def test_a_plan_of_a_video_has_its_sets_and_rows(self, game):
        model = game.models["holitom"]
        with torch.inference_mode():
            [[merged]] = model(**game.inputs(), logits_to_keep=1).merged_videos
        plan = plan_of(merged)
        rows = {(int(f), int(p) // 13) for f, p, kind in zip(merged.frame, merged.position, merged.kind) if kind < 2}
        assert (plan.num_tokens, plan.num_newlines) == (int((merged.kind < 2).sum()), len(rows))
        planned = plan_video(model.config.holitom_config, self.FRAMES, 169, 0.6, self.FRAMES, newline_rows=13)
        assert len(plan.num_static) == len(planned.num_static) == len(merged.segments) == 1
        assert plan.num_tokens == pytest.approx(planned.num_tokens, rel=0.06)

    @pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3])
    @pytest.mark.parametrize("method", ["holitom", "random_tokens"])
    def test_newlines_are_estimated_where_no_video_is_known(self, ratio, method):
        features = synthetic_features(64, 169, 32, 0.6, scene_frames=8)
        importance = torch.rand(64, 169, generator=torch.Generator().manual_seed(0))
        settings = HoliTomConfig(
            outer_method=method, retention_ratio=ratio, similarity_threshold=0.65, newline_position="row"
        )
        merged = merge_video_tokens(features, importance, settings, newline=torch.zeros(32))
        planned = plan_video(settings, 64, 169, 0.6, 8, newline_rows=13)
        assert plan_of(merged).num_newlines == pytest.approx(planned.num_newlines, rel=0.04)
        assert planned.num_newlines < 64 * 13

    def test_all_newlines_are_there_where_nothing_is_merged(self, game):
        plain, ours, _ = compare_flops(architecture("llava-video-7b"), 64, 34)
        text = architecture("llava-video-7b").text_config
        assert plain.decoder == decoder_flops(text, [64 * 13 * 14 + 34] * 28)
        fewest, most = (decoder_flops(text, [round(0.15 * 64 * 169) + 34 + n] * 28) for n in (0, 64 * 13))
        assert ours.decoder < 0.8 * most
        assert ours.decoder > 0.6 * fewest  # layers from the 18th on have half of it


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl-7b", 8.29), ("qwen3-vl-8b", 8.77), ("qwen3.5-9b", 9.41)])
def test_qwens_have_the_sizes_of_their_names(name, billions):
    config = qwen_architecture(name)
    with torch.device("meta"):
        model = backbone_class(config.backbone, "generation")(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_sizes_of_their_names(name):
    config = architecture(name)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(copy.deepcopy(config))
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    assert billions == pytest.approx({"0.5b": 0.89, "7b": 8.03, "72b": 73.2, "tiny": 0.0097}[name], rel=0.02)


def test_an_unknown_architecture_names_those_there_are():
    with pytest.raises(ValueError, match=r"no architecture '8b': choose one of 0\.5b, 7b, 72b, tiny"):
        architecture("8b")


def test_with_an_exact_budget_the_plan_has_that_number():
    settings = HoliTomConfig(retention_ratio=0.1)
    sizes = [plan_video(replace(settings, exact_budget=exact), FRAMES, 196) for exact in (False, True)]
    assert sizes[1].num_tokens == round(0.1 * FRAMES * 196) != sizes[0].num_tokens
    assert sizes[0].num_clusters == sizes[1].num_clusters
