"""Qwen-VL's vision towers over packed rows against upstream's that compute everything and overwrite what repeats."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from holitom_hf.checkpoints.flattening import flat_package
from holitom_hf.merging import patches, segment_frames
from holitom_hf.merging.patches import PatchPlan
from holitom_hf.models.qwen_vl.operations import encoder_operations
from holitom_hf.models.qwen_vl.packed_blocks import AttentionGroups
from holitom_hf.models.qwen_vl.vision import QwenVideoFeatures

from . import qwen
from .qwen import FAMILIES, MERGE, PATCH, Family, media, window_order
from .test_vision_reuse import flash_stand_in


REUSE = {"vision_reuse_layer": 1, "vision_reuse_threshold": 0.9}
NOT_SHORTENED = {"outer_method": "none", "inner_method": "none"}
GRIDS = [(7, 6, 10), (1, 4, 4), (5, 8, 4)]  # windows of 2 x 2 tokens, at the edges smaller ones; two sizes of frames


# A tower of each kind: with windows, with DeepStack, with neither.
@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family):
    return make_model(family)


@pytest.fixture(scope="module")
def upstream(family, model):
    return upstream_of(family, model)


def make_model(family: Family, seed: int = 0, **vision):
    torch.manual_seed(seed)
    values = copy.deepcopy(family.values)
    values["vision_config"] |= vision
    return family.generation(family.ours("Config")(**values, holitom_config=qwen.ON)).eval()


def upstream_of(family: Family, model):
    """Upstream's class with a model's weights."""
    values = model.config.to_dict()
    values.pop("holitom_config")
    found = family.upstream(family.upstream.config_class(**values)).eval()
    found.load_state_dict(model.state_dict())
    return found.to(model.dtype)


def random_video(grid: tuple[int, int, int], seed: int = 0, static_share: float = 0.6) -> torch.Tensor:
    """(P, C): scenes of a few frames, in which some squares stay, some drift, and in some single patches change."""
    random = torch.Generator().manual_seed(seed)
    size = (grid[1] * grid[2], 3 * 2 * PATCH * PATCH)
    frames = []
    while len(frames) < grid[0]:
        scene, drift = torch.randn(2, *size, generator=random)
        for step in range(int(torch.randint(1, 6, (), generator=random))):
            squares = torch.rand(size[0] // MERGE**2, 1, generator=random) > static_share
            changes = squares.repeat_interleave(MERGE**2, 0) & (torch.rand(size[0], 1, generator=random) > 0.3)
            frames.append(scene + 0.05 * step * drift + changes * torch.randn(size, generator=random))
    return torch.stack(frames[: grid[0]]).flatten(0, 1)


def random_videos(grids=GRIDS, seed: int = 0) -> dict:
    return media([(grid, random_video(grid, seed + v)) for v, grid in enumerate(grids)])


def repeating(states: torch.Tensor, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """What repeats of (F, P, D), and each frame's first one. Segment by segment and patch by patch."""
    threshold = settings.vision_reuse_threshold
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    similarity = (unit[1:] * unit[:-1]).sum(-1)
    repeats = torch.zeros(states.shape[:2], dtype=torch.bool)
    first = torch.arange(len(states))
    for start, stop in segment_frames(similarity, threshold):
        first[start:stop] = start
        for patch in range(states.shape[1]):
            if (similarity[start : stop - 1, patch] > threshold).all():
                for frame in range(start + 1, stop):
                    like_first = unit[frame, patch] @ unit[start, patch] > threshold
                    repeats[frame, patch] = like_first or not settings.vision_drift_guard
    if (~repeats).float().mean() > patches.DENSE_SHARE:
        repeats[:] = False
    return repeats, first


class Overwriting:
    """
    Upstream's tower, which computes all patches of a video and overwrites what repeats after every block.

    Attributes:
        hidden: Every hidden state (F*P, D), in the tower's order.
        repeats: (F, P), which patches were overwritten, in that order.
        features, maps: What the mergers make of it, row by row.
    """

    def __init__(self, tower, pixels, grid, settings):
        self.tower, self.grid = tower, grid
        start = settings.vision_reuse_layer
        dense = self.run(pixels, lambda index, states: states)
        self.repeats, first = repeating(dense[start].detach().unflatten(0, (grid[0], -1)), settings)

        def overwrite(states):
            frames = states.unflatten(0, (grid[0], -1))
            return torch.where(self.repeats[..., None], frames[first], frames).flatten(0, 1)

        states = self.run(pixels, lambda index, states: overwrite(states) if index >= start else states)
        self.hidden = [*map(overwrite, states[:start]), *states[start:]]
        self.features = self.row_by_row(tower.merger(self.hidden[-1]))
        self.maps = [
            self.row_by_row(merger(self.hidden[layer + 1]))
            for layer, merger in zip(
                getattr(tower, "deepstack_visual_indexes", ()), getattr(tower, "deepstack_merger_list", ())
            )
        ]

    def run(self, pixels, change) -> list[torch.Tensor]:
        """The hidden states where `change` makes each block's output another."""
        found = []

        def before(module, args, kwargs):
            found.append(args[0])

        def after(module, args, output):
            found.append(change(len(found), output))
            return found[-1]

        blocks = self.tower.blocks
        hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(after) for block in blocks]
        self.tower(pixels, grid_thw=torch.tensor([self.grid]))
        for hook in hooks:
            hook.remove()
        return found

    def row_by_row(self, tokens: torch.Tensor) -> torch.Tensor:
        """(F*T, ...) as the frames have them."""
        if not hasattr(self.tower, "window_size"):
            return tokens
        frames = tokens.unflatten(0, (self.grid[0], -1))
        placed = torch.empty_like(frames)
        placed[:, window_order(self.grid[1] // MERGE, self.grid[2] // MERGE)] = frames
        return placed.flatten(0, 1)

    @property
    def computed(self) -> torch.Tensor:
        """(F, P), row by row of patches."""
        (frames, height, width), square = self.grid, range(MERGE)
        tokens = self.row_by_row((~self.repeats).unflatten(1, (-1, MERGE**2)).flatten(0, 1)).unflatten(0, (frames, -1))
        found = torch.empty(frames, height, width, dtype=torch.bool)
        for token in range(tokens.shape[1]):
            top, left = (MERGE * place for place in divmod(token, width // MERGE))
            for number, (y, x) in enumerate((y, x) for y in square for x in square):
                found[:, top + y, left + x] = tokens[:, token, number]
        return found.flatten(1)

    def importance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(F, T) and (F, T, head_dim), from the last block's matrices and projections."""
        block, states = self.tower.blocks[-1], self.hidden[-2]
        own, self.tower.config._attn_implementation = self.tower.config._attn_implementation, "recording"
        block.attn.recorded = []
        hook = block.register_forward_pre_hook(lambda module, args: (states,))
        self.tower(torch.zeros(len(states), 3 * 2 * PATCH * PATCH), grid_thw=torch.tensor([self.grid]))
        hook.remove()
        self.tower.config._attn_implementation = own
        received = torch.cat([weights.mean((1, 2)) for weights in block.attn.recorded])  # (F, P)
        projected = block.attn.qkv(block.norm1(states)).view(len(states), 3, block.attn.num_heads, -1)
        keys = projected[:, 1].mean(1)
        found = (self.row_by_row(x.unflatten(0, (-1, MERGE**2)).mean(1)) for x in (received.flatten(), keys))
        return tuple(values.unflatten(0, (self.grid[0], -1)) for values in found)

    def encoded(self) -> QwenVideoFeatures:
        importance, keys = self.importance()
        return QwenVideoFeatures(
            pooler_output=[self.features],
            deepstack_features=[[layer] for layer in self.maps] or None,
            importance=[importance],
            attention_keys=[keys],
            grids=[self.grid],
        )


def overwritten(upstream, inputs: dict, settings) -> list[Overwriting]:
    """Video by video."""
    grids = [tuple(grid) for grid in inputs["video_grid_thw"].tolist()]
    videos = inputs["pixel_values_videos"].split([t * h * w for t, h, w in grids])
    return [Overwriting(upstream.model.visual, pixels, grid, settings) for pixels, grid in zip(videos, grids)]


def assert_equal_to(found: QwenVideoFeatures, expected: list[Overwriting], **tolerance) -> None:
    assert len(found.pooler_output) == len(expected)
    for v, video in enumerate(expected):
        assert torch.equal(found.computed_patches[v], video.computed)
        torch.testing.assert_close(found.pooler_output[v], video.features, **tolerance)
        for mine, theirs in zip([layer[v] for layer in found.deepstack_features or []], video.maps, strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)
    if found.hidden_states:
        for index, states in enumerate(found.hidden_states):
            torch.testing.assert_close(states, torch.cat([video.hidden[index] for video in expected]), **tolerance)
        torch.testing.assert_close(found.last_hidden_state, found.hidden_states[-1], atol=0, rtol=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_packed_rows_equal_overwriting_after_every_block(family, seed, guard, layer):
    model = make_model(family, seed)
    threshold = (0.8, 0.9, 0.97)[seed % 3]
    settings = replace(qwen.ON, vision_reuse_layer=layer, vision_reuse_threshold=threshold, vision_drift_guard=guard)
    inputs = random_videos(seed=seed)
    expected = overwritten(upstream_of(family, model), inputs, settings)
    assert any(0.05 < video.repeats.float().mean() < 0.95 for video in expected)
    for at_once in (None, 3, 1):
        found = model.get_video_features(
            **inputs, vision_batch_size=at_once, output_hidden_states=True, holitom_config=settings
        )
        assert_equal_to(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe"])
@torch.no_grad()
def test_towers_before_decoders_with_experts_leave_out_the_same(name):
    family, inputs, settings = FAMILIES[name], random_videos(), replace(qwen.ON, **REUSE)
    model = make_model(family)
    expected = overwritten(upstream_of(family, model), inputs, settings)
    assert any(0.05 < video.repeats.float().mean() < 0.95 for video in expected)
    found = model.get_video_features(**inputs, holitom_config=settings)
    assert_equal_to(found, expected, atol=2e-5, rtol=1e-5)
    for received, video in zip(found.importance, expected, strict=True):
        torch.testing.assert_close(received, video.importance()[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("blocks", [[], [1]])
@torch.no_grad()
def test_other_numbers_of_deepstack_layers(blocks):
    family = FAMILIES["qwen3_vl"]
    model = make_model(family, deepstack_visual_indexes=blocks)
    inputs, settings = random_videos(), replace(qwen.ON, **REUSE)
    found = model.get_video_features(**inputs, holitom_config=settings)
    assert len(found.deepstack_features or []) == len(blocks)
    assert_equal_to(found, overwritten(upstream_of(family, model), inputs, settings), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_importance_and_keys_are_those_of_the_tower_that_overwrites(model, upstream):
    inputs, settings = random_videos(), replace(qwen.ON, **REUSE)
    expected = overwritten(upstream, inputs, settings)
    for at_once in (None, 2):
        found = model.get_video_features(**inputs, vision_batch_size=at_once, holitom_config=settings)
        assert_equal_to(found, expected, atol=2e-5, rtol=1e-5)
        for received, keys, video in zip(found.importance, found.attention_keys, expected, strict=True):
            torch.testing.assert_close(received, video.importance()[0], atol=1e-7, rtol=1e-5)
            torch.testing.assert_close(keys, video.importance()[1], atol=1e-5, rtol=1e-5)
    assert found.last_hidden_state is not None
    without = model.get_video_features(**inputs, holitom_config=replace(settings, **NOT_SHORTENED))
    assert without.importance is without.attention_keys is None


@torch.no_grad()
def test_a_still_video_computes_one_temporal_patch(model, upstream):
    grid = (6, 6, 10)
    inputs = media([(grid, random_video((1, *grid[1:])).repeat(6, 1))])
    found = model.get_video_features(**inputs, holitom_config={"vision_reuse_layer": 1})
    assert found.computed_patches[0].sum(1).tolist() == [60, 0, 0, 0, 0, 0]
    assert found.rows_by_layer[0].tolist() == [6 * [60], *3 * [[60, 0, 0, 0, 0, 0]]]
    expected = upstream.get_video_features(**inputs)
    torch.testing.assert_close(found.pooler_output[0], expected.pooler_output[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [1, 0.9999])
@torch.no_grad()
def test_where_nothing_repeats_every_patch_is_computed_as_upstream_does(model, upstream, threshold):
    inputs = media([qwen.video(GRIDS[0], 1)])
    if threshold == 1:
        inputs["pixel_values_videos"] = random_video((1, *GRIDS[0][1:])).repeat(7, 1)
    settings = {"vision_reuse_layer": 2, "vision_reuse_threshold": threshold}
    found = model.get_video_features(**inputs, output_hidden_states=True, holitom_config=settings)
    expected = upstream.get_video_features(**inputs, output_hidden_states=True)
    assert found.computed_patches[0].all()
    assert torch.equal(found.pooler_output[0], expected.pooler_output[0])
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(
        found.deepstack_features or [], getattr(expected, "deepstack_features", None) or [], strict=True
    ):
        assert torch.equal(mine[0], theirs[0])


@torch.no_grad()
def test_neither_the_batch_nor_the_order_of_videos_matters(model):
    names = ("pooler_output", "importance", "attention_keys", "computed_patches", "rows_by_layer")
    videos = [(grid, random_video(grid, 5 + v)) for v, grid in enumerate([*GRIDS, GRIDS[0]])]
    together = model.get_video_features(**media(videos), holitom_config=REUSE)
    backwards = model.get_video_features(**media(videos[::-1]), holitom_config=REUSE)
    for v, video in enumerate(videos):
        alone = model.get_video_features(**media([video]), holitom_config=REUSE)
        for name in names:
            assert torch.equal(getattr(together, name)[v], getattr(alone, name)[0]), name
            assert torch.equal(getattr(backwards, name)[-1 - v], getattr(alone, name)[0]), name
        for both, mine in zip(together.deepstack_features or [], alone.deepstack_features or [], strict=True):
            assert torch.equal(both[v], mine[0])


@torch.no_grad()
def test_the_towers_own_outputs_can_be_asked_for(model):
    inputs = random_videos()
    whole = model.get_video_features(**inputs, output_hidden_states=True, holitom_config=REUSE)
    for asked, kept in (([2], [2]), ([-1, 0], [0, 4]), (3, [3])):
        some = model.get_video_features(**inputs, output_hidden_states=asked, holitom_config=REUSE)
        assert [index for index, states in enumerate(some.hidden_states) if states is not None] == kept
        for index in kept:
            assert torch.equal(some.hidden_states[index], whole.hidden_states[index])
        assert torch.equal(some.last_hidden_state, whole.last_hidden_state)
    none = model.get_video_features(**inputs, holitom_config=REUSE)
    assert none.hidden_states is None
    bare = model.get_video_features(
        **inputs, output_hidden_states=True, return_vision_states=False, holitom_config=REUSE
    )
    assert bare.hidden_states is bare.last_hidden_state is None


@pytest.mark.parametrize(
    "attention",
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow), "stand_in_flash_attention"],
)
@torch.no_grad()
def test_every_attention_gives_the_same(family, model, attention):
    inputs = random_videos()
    expected = model.get_video_features(**inputs, holitom_config=REUSE)
    AttentionInterface.register("stand_in_flash_attention", flash_stand_in)
    other = make_model(family)
    other.model.visual.config._attn_implementation = attention
    for at_once in (None, 2):
        found = other.get_video_features(**inputs, vision_batch_size=at_once, holitom_config=REUSE)
        assert all(map(torch.equal, found.computed_patches, expected.computed_patches))
        assert any(not computed.all() for computed in found.computed_patches)
        for name in ("pooler_output", "importance"):
            for mine, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(family, dtype):
    model = make_model(family).to(dtype)
    inputs, settings = random_videos(), replace(qwen.ON, **REUSE)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    expected = overwritten(upstream_of(family, model), inputs, settings)
    found = model.get_video_features(**inputs, holitom_config=settings)
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]  # rotations are in float32
    for computed, features, video in zip(found.computed_patches, found.pooler_output, expected, strict=True):
        assert features.dtype == dtype
        # At the threshold rounding may decide.
        assert (computed == video.computed).float().mean() > (0.97 if dtype != torch.float64 else 0.999)
        if torch.equal(computed, video.computed):
            torch.testing.assert_close(features, video.features, atol=tolerance, rtol=tolerance)
    assert any(map(torch.equal, found.computed_patches, [video.computed for video in expected]))


@pytest.mark.parametrize("at_once", [None, 2])
def test_gradients_are_those_of_overwriting(family, model, upstream, at_once):
    inputs, settings = random_videos(), replace(qwen.ON, **REUSE, **NOT_SHORTENED)
    model.zero_grad()
    upstream.zero_grad()
    found = model.get_video_features(**inputs, vision_batch_size=at_once, holitom_config=settings)
    expected = overwritten(upstream, inputs, settings)
    theirs = [values for video in expected for values in (video.features, *video.maps)]
    layers = [found.pooler_output, *(found.deepstack_features or [])]
    mine = [layer[v] for v in range(len(GRIDS)) for layer in layers]
    weights = [torch.randn(values.shape, generator=torch.Generator().manual_seed(7)) for values in theirs]
    for values in (mine, theirs):
        sum((each * weight).sum() for each, weight in zip(values, weights, strict=True)).backward()
    named = dict(upstream.model.visual.named_parameters())
    assert len(named) > 50
    for name, parameter in model.model.visual.named_parameters():
        expected_gradient = named[name].grad
        scale = expected_gradient.abs().max()
        torch.testing.assert_close(parameter.grad / scale, expected_gradient / scale, atol=1e-4, rtol=1e-3, msg=name)
    model.zero_grad()


@pytest.mark.parametrize("decoder", [{}, NOT_SHORTENED], ids=["compressed", "whole"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_over_what_changes(family, model, upstream, decoder, num_beams):
    grids = [GRIDS[0], GRIDS[2]]
    videos = [(grid, random_video(grid, 3 + v)) for v, grid in enumerate(grids)]
    prompts = [family.prompt(3, grid, 4, seed=v) for v, grid in enumerate(grids)]
    tokens = [qwen.VISION_START, qwen.VISION_END, qwen.IMAGE, qwen.VIDEO]
    settings = replace(qwen.ON, **REUSE | decoder)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams, "suppress_tokens": tokens}
    together = model.generate(**qwen.inputs_of(prompts, videos), **kwargs, holitom_config=settings)
    for row, (prompt, video) in enumerate(zip(prompts, videos)):
        inputs = qwen.inputs_of([prompt], [video])
        [simulated] = overwritten(upstream, inputs, settings)
        assert 0.2 < simulated.computed.float().mean() < 0.9
        with torch.no_grad():
            encoded = simulated.encoded()
        given = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        if not family.is_timed:
            given.pop("video_grid_thw")
        expected = model.generate(
            **given,
            mm_encoder_outputs={"video": encoded},
            **kwargs,
            holitom_config=replace(settings, vision_reuse_layer=None),
        )
        alone = model.generate(**inputs, **kwargs, holitom_config=settings)
        assert torch.equal(alone, expected)
        assert torch.equal(together[row, -4:], expected[0, -4:])


def test_training_over_what_changes(family, model):
    """With checkpoints of activations and without, a loss and its gradients are the same."""
    grid = GRIDS[0]
    prompt = family.prompt(3, grid, 4)
    inputs = qwen.inputs_of([prompt], [(grid, random_video(grid, 3))])
    labels = torch.where(inputs["input_ids"] < qwen.VISION_START, inputs["input_ids"], -100)
    gradients = []
    for is_checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if is_checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained(**inputs, labels=labels, use_cache=False, holitom_config=replace(qwen.ON, **REUSE)).loss.backward()
        gradients.append(trained.model.visual.blocks[-2].attn.qkv.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@torch.inference_mode()
def test_weights_on_the_disk(family, model, tmp_path):
    """They are fetched by accelerate's hooks, also where a block's parts are called by themselves."""
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.model.visual.named_children()}
    device_map = {f"model.visual.{name}": place for name, place in device_map.items() if name != "blocks"}
    device_map |= {f"model.visual.blocks.{index}": "disk" if index in (0, 2) else "cpu" for index in range(4)}
    device_map |= {"model.visual.merger": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    loaded = family.generation.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(weight.is_meta for weight in loaded.model.visual.parameters())
    inputs = random_videos()
    found, whole = (each.get_video_features(**inputs, holitom_config=REUSE) for each in (loaded, model))
    assert any(not computed.all() for computed in whole.computed_patches)
    for mine, theirs in zip(found.pooler_output, whole.pooler_output, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_attention_runs_in_few_launches_however_many_windows_there_are():
    random = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 64, 128, 160, 224, 288, 320]).numpy()
    is_computed = torch.rand(200, 320, generator=random) > torch.rand(200, 1, generator=random)
    is_computed[::10] = True
    plan = PatchPlan.of(is_computed, [frame - frame % 10 for frame in range(200)])
    groups = AttentionGroups.of(plan, bounds)
    batches, found_at = groups.batches
    assert len(batches) <= 2 * patches.NUM_BATCHES
    own = torch.cat([rows.flatten() for rows, _ in batches])
    assert torch.equal(own[found_at], torch.arange(int(plan.starts[-1])))
    assert len(own) < 1.25 * plan.starts[-1]
    for rows, slot in batches:  # every row is among the places that it is asked over
        is_own = (rows[:, :1] <= slot) & (slot < rows[:, -1:] + 1)
        assert is_own.any(1).all()


def test_no_piece_has_more_frames_than_may_exist_at_once(family, monkeypatch):
    seen = []
    attend = AttentionGroups.attend
    monkeypatch.setattr(
        AttentionGroups,
        "attend",
        lambda self, *args: (seen.append(self.slot.numel()), attend(self, *args))[1],
    )
    grid = (20, 6, 10)
    inputs = media([(grid, random_video((1, 6, 10)).repeat(20, 1))])
    with torch.no_grad():
        make_model(family).get_video_features(**inputs, vision_batch_size=4, holitom_config=REUSE)
    assert max(seen) <= 5 * 60  # and the first frame of a segment that began before


@pytest.mark.parametrize("needs_importance", [True, False])
@torch.no_grad()
def test_operations_are_those_that_torch_counts(model, needs_importance):
    """Of the second of two frames every other row of squares changes, half of every window."""
    grid = (2, 12, 10)
    first, other = torch.randn(2, 6, 5, MERGE**2, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(0))
    second = torch.where((torch.arange(6) % 2 == 1)[:, None, None, None], other, first)
    inputs = media([(grid, torch.stack([first, second]).view(240, -1))])
    settings = replace(qwen.ON, vision_reuse_layer=1, vision_reuse_threshold=0.7)
    settings = settings if needs_importance else replace(settings, **NOT_SHORTENED)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = model.get_video_features(**inputs, holitom_config=settings)
    assert found.computed_patches[0].view(2, 6, 2, 10).float().mean((2, 3)).tolist() == [6 * [1], 3 * [0, 1]]
    size = (12 * PATCH, 10 * PATCH)
    expected = encoder_operations(model.config, 4, size, settings, computed_share=0.75)
    total = expected.vision_tower + expected.projector + (expected.importance if needs_importance else 0)
    # The two frames are multiplied 2x2, which is one product too many for every patch.
    assert counter.get_total_flops() == total + 2 * 32 * 120
    whole, dense = (
        encoder_operations(model.config, 4, size, chosen)
        for chosen in (settings, replace(settings, vision_reuse_layer=None))
    )
    assert whole.vision_tower - dense.vision_tower == 2 * 32 * 120 * 3  # what decides
    assert (whole.projector, whole.importance) == (dense.projector, dense.importance)
    with pytest.raises(ValueError, match="has 4 layers: choose 1 to 3"):
        encoder_operations(model.config, 4, size, replace(settings, vision_reuse_layer=9))


@pytest.mark.parametrize("method", ["frames", "tome"])
def test_other_vision_methods_are_llavas(family, model, method):
    message = rf"'{method}' is for LLaVA alone: with Qwen.*choose 'reuse'"
    with pytest.raises(ValueError, match=message):
        model.get_video_features(**random_videos(), holitom_config=REUSE | {"vision_method": method})
    with pytest.raises(ValueError, match=message):
        encoder_operations(model.config, 4, settings=replace(qwen.ON, **REUSE, vision_method=method))


def test_settings_that_do_not_fit_the_tower_say_so(model):
    with pytest.raises(ValueError, match=r"vision_reuse_layer is 4, but the vision tower of Qwen.* has 4 .*1 to 3"):
        model.get_video_features(**random_videos(), holitom_config={"vision_reuse_layer": 4})
    with pytest.raises(ValueError, match="no attentions to return"):
        model.get_video_features(**random_videos(), output_attentions=True, holitom_config=REUSE)


@torch.no_grad()
def test_importance_needs_a_last_block_that_sees_the_frame():
    model = make_model(FAMILIES["qwen2_5_vl"], fullatt_block_indexes=[0, 2])
    with pytest.raises(ValueError, match=r"last block \(3\) attends within windows"):
        model.get_video_features(**random_videos(), holitom_config=REUSE)
    found = model.get_video_features(**random_videos(), holitom_config=REUSE | {"outer_method": "farthest_points"})
    assert found.importance is None


def test_a_checkpoints_own_code_does_without_and_says_so(model, monkeypatch):
    carried = flat_package(model.config.backbone)
    assert not [name for name in carried if name.endswith(("reuse", "packed_blocks", "frame_layout", "patches"))]
    monkeypatch.setitem(sys.modules, "holitom_hf.models.qwen_vl.reuse", None)
    with pytest.raises(ImportError, match=r"reuse' is what vision_reuse_layer needs.*pip install holitom-hf"):
        model.get_video_features(**random_videos(), holitom_config=REUSE)
