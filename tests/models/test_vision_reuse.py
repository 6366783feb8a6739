"""The tower over packed rows against a tower that computes everything and overwrites what repeats."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionModel
from holitom_hf.merging import patches, segment_frames
from holitom_hf.merging.patches import PatchPlan, plan_patches
from holitom_hf.models.siglip import HoliTomSiglipVisionModel
from holitom_hf.models.vision import HoliTomVideoFeatures
from holitom_hf.models.vision_importance import vision_importance

from ..conftest import SMALL, make_prompt, make_video, pad_batch


def random_tower(seed: int = 0, num_layers: int = 4, **kwargs) -> HoliTomSiglipVisionModel:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        num_attention_heads=3,
        image_size=24,
        patch_size=4,
        vision_use_head=False,
    )
    return HoliTomSiglipVisionModel._from_config(config, **kwargs).eval()


def random_video(num_frames: int, seed: int = 0, static_share: float = 0.6) -> torch.Tensor:
    """(F, 3, 24, 24): scenes of a few frames, in which some patches stay and some drift or change."""
    random = torch.Generator().manual_seed(seed)
    frames = []
    while len(frames) < num_frames:
        scene = torch.randn(3, 24, 24, generator=random)
        drift = 0.05 * torch.randn(3, 24, 24, generator=random)
        for step in range(int(torch.randint(1, 6, (), generator=random))):
            changes = (torch.rand(1, 6, 6, generator=random) > static_share).repeat_interleave(4, 1)
            changes = changes.repeat_interleave(4, 2)
            frames.append(scene + step * drift + changes * torch.randn(3, 24, 24, generator=random))
    return torch.stack(frames[:num_frames])


@torch.no_grad()
def overwritten(tower, pixels, num_frames, settings) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Every hidden state (F, P, D) of a tower that computes all and after each layer overwrites what repeats, and what
    that is. Segment by segment and patch by patch.
    """
    states = tower.embeddings(pixels)
    hidden = [states]
    for layer in tower.encoder.layers[: settings.vision_reuse_layer]:
        states = layer(states, None)
        hidden.append(states)
    unit = torch.nn.functional.normalize(states, dim=-1)
    repeats = torch.zeros(states.shape[:2], dtype=torch.bool)
    first = torch.arange(len(states))
    offset = 0
    for number in num_frames:
        of_video = unit[offset : offset + number]
        similarity = (of_video[1:] * of_video[:-1]).sum(-1)
        mine = torch.zeros(number, states.shape[1], dtype=torch.bool)
        for start, stop in segment_frames(similarity, settings.vision_reuse_threshold):
            for patch in range(states.shape[1]):
                if (similarity[start : stop - 1, patch] > settings.vision_reuse_threshold).all():
                    for frame in range(start + 1, stop):
                        like_first = of_video[frame, patch] @ of_video[start, patch] > settings.vision_reuse_threshold
                        mine[frame, patch] = like_first or not settings.vision_drift_guard
            first[offset + start : offset + stop] = offset + start
        if (~mine).float().mean() <= patches.DENSE_SHARE:
            repeats[offset : offset + number] = mine
        offset += number
    hidden = [torch.where(repeats[..., None], one[first], one) for one in hidden]
    states = hidden[-1]
    for layer in tower.encoder.layers[settings.vision_reuse_layer :]:
        states = layer(states, None)
        states = torch.where(repeats[..., None], states[first], states)
        hidden.append(states)
    return hidden, repeats


def packed(tower, pixels, num_frames, settings, frames_at_once=1000, chunk=1000):
    wanted = set(range(len(tower.encoder.layers) + 1))
    with torch.no_grad():
        plan, parts = tower.encode_changes(pixels.split(chunk), num_frames, settings, wanted, frames_at_once)
        parts = list(parts)
    return plan, [torch.cat([part.frames(index) for part in parts]) for index in sorted(wanted)], parts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("layer", [1, 3])
def test_packed_rows_equal_overwriting_after_every_layer(seed, guard, layer):
    tower = random_tower(seed)
    num_frames = [[9, 1, 6], [16], [3, 13], [2]][seed % 4]
    pixels = torch.cat([random_video(number, seed + v) for v, number in enumerate(num_frames)])
    threshold = (0.9, 0.97, 0.995)[seed % 3]
    settings = HoliTomConfig(vision_reuse_layer=layer, vision_reuse_threshold=threshold, vision_drift_guard=guard)
    hidden, repeats = overwritten(tower, pixels, num_frames, settings)
    for frames_at_once, chunk in ((1000, 1000), (3, 4), (1, 1)):
        plan, found, _ = packed(tower, pixels, num_frames, settings, frames_at_once, chunk)
        assert torch.equal(plan.is_computed, ~repeats)
        for mine, theirs in zip(found, hidden, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_a_still_video_computes_one_frame():
    tower, settings = random_tower(), HoliTomConfig(vision_reuse_layer=1)
    pixels = random_video(1).expand(7, -1, -1, -1)
    plan, found, _ = packed(tower, pixels, [7], settings)
    assert plan.num_rows.tolist() == [36, 0, 0, 0, 0, 0, 0]
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [1, 0.9999])
def test_where_nothing_repeats_every_patch_is_computed_as_upstream_does(threshold):
    tower = random_tower()
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    settings = HoliTomConfig(vision_reuse_layer=2, vision_reuse_threshold=threshold)
    plan, found, _ = packed(tower, pixels, [5], settings)
    assert plan.is_dense
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_threshold_one_computes_all_of_a_still_video():
    plan = plan_patches(torch.ones(4, 6, 3), [4], HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=1))
    assert plan.is_computed.all()


def test_a_video_of_which_next_to_nothing_repeats_is_computed_whole():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(8, 100, 16, generator=random)
    for num_static, is_packed in ((3, False), (4, True)):  # 7 of 8 frames repeat them: 2.6 and 3.5 %
        video = states.clone()
        video[:, :num_static] = video[:1, :num_static]
        settings = HoliTomConfig(vision_reuse_layer=1)
        both = plan_patches(torch.cat([video, video[:1].expand(5, -1, -1)]), [8, 5], settings)
        assert both.is_computed[:8].all() == (not is_packed)
        assert both.is_computed[8:].sum() == 100


def test_slow_drift_is_stopped_by_the_first_frame():
    angle = torch.arange(12.0)[:, None, None] * 0.05
    states = torch.cat([angle.cos(), angle.sin()], dim=-1).expand(12, 9, 2)
    settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.99)
    guarded = plan_patches(states, [12], settings)
    loose = plan_patches(states, [12], HoliTomConfig(**{**settings.to_dict(), "vision_drift_guard": False}))
    assert loose.num_rows.tolist() == [9] + 11 * [0]
    assert guarded.num_rows[:3].tolist() == [9, 0, 0]  # 0.1 rad have a cosine of 0.995
    assert guarded.num_rows[3:].tolist() == 9 * [9]


@pytest.mark.parametrize("frames_at_once", [1, 2, 5])
def test_pieces_hold_every_row_once_and_all_they_need(frames_at_once):
    random = torch.Generator().manual_seed(3)
    first_frame = [0, 0, 0, 3, 4, 4, 4, 4, 8]
    is_computed = torch.rand(9, 10, generator=random) > 0.7
    is_computed[[0, 3, 4, 8]] = True
    plan = PatchPlan.of(is_computed, first_frame)
    states = torch.arange(90).view(9, 10, 1)
    rows = plan.gather(states)
    pieces = list(plan.pieces(frames_at_once))
    assert torch.equal(torch.cat([piece.own(piece.take(rows)) for piece in pieces]), rows)
    places = torch.cat([piece.take(rows)[piece.own_slot] for piece in pieces])
    assert torch.equal(places, torch.where(is_computed[..., None], states, states[torch.tensor(first_frame)]))
    for piece in pieces:
        assert len(piece.take(rows)) == piece.plan.starts[-1]
        batches, found_at = piece.plan.batches
        flat = torch.cat([of_batch.flatten() for _, of_batch in batches])
        assert torch.equal(flat[found_at], torch.arange(len(found_at)))


def test_attention_runs_in_few_launches_however_many_frames_there_are():
    random = torch.Generator().manual_seed(0)
    is_computed = torch.rand(300, 64, generator=random) > torch.rand(300, 1, generator=random)
    is_computed[::10] = True
    plan = PatchPlan.of(is_computed, [frame - frame % 10 for frame in range(300)])
    batches, _ = plan.batches
    assert len(batches) <= patches.NUM_BATCHES
    padded = sum(rows.numel() for _, rows in batches)
    assert padded < 1.25 * plan.starts[-1]


@pytest.mark.parametrize(
    "attention",
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow), "sdpa", "stand_in_flash_attention"],
)
def test_every_attention_gives_the_same(attention):
    if attention.startswith("stand_in"):
        AttentionInterface.register(attention, flash_stand_in)
    tower = random_tower()
    other = random_tower(attn_implementation=attention) if not attention.startswith("stand_in") else random_tower()
    other.config._attn_implementation = attention
    settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9)
    pixels = random_video(11, seed=5)
    plan, expected, _ = packed(tower, pixels, [11], settings)
    assert (plan.num_rows == 0).sum() > 0 or plan.num_rows.min() < 36
    _, found, _ = packed(other, pixels, [11], settings)
    torch.testing.assert_close(found[-1], expected[-1], atol=5e-6, rtol=1e-4)


def flash_stand_in(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs
):
    """Frame by frame what a kernel for sequences of different lengths does; whole frames where there are none."""
    if cu_seq_lens_q is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, is_causal=False
        )
    assert query.shape[0] == 1
    assert kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
    assert kwargs["max_length_k"] == cu_seq_lens_k.diff().max()
    assert cu_seq_lens_q.dtype == torch.int32
    outputs = []
    for q, k in zip(pairwise(cu_seq_lens_q), pairwise(cu_seq_lens_k), strict=True):
        of_frame, keys, values = query[0, :, slice(*q)], key[0, :, slice(*k)], value[0, :, slice(*k)]
        outputs.append((of_frame @ keys.mT * scaling).softmax(-1) @ values)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    tower = random_tower().to(dtype)
    settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9)
    pixels = random_video(9, seed=2).to(dtype)
    plan, found, _ = packed(tower, pixels, [9], settings)
    hidden, repeats = overwritten(tower.double(), pixels.double(), [9], settings)
    assert (plan.is_computed == ~repeats).float().mean() > 0.97  # at the threshold rounding may decide
    exact = plan.is_computed.equal(~repeats)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    if exact:
        torch.testing.assert_close(found[-1].double(), hidden[-1], atol=tolerance, rtol=tolerance)
    assert exact or dtype != torch.float64


def test_gradients_are_those_of_overwriting():
    tower = random_tower().train()
    settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9)
    pixels = random_video(7, seed=4)
    hidden, repeats = overwritten(tower, pixels, [7], settings)
    weight = torch.randn_like(hidden[-1])
    plan, parts = tower.encode_changes([pixels], [7], settings, {3, 4}, 2)
    torch.autograd.backward(torch.cat([part.frames(4) for part in parts]), weight)
    found = {
        name: parameter.grad.clone() for name, parameter in tower.named_parameters() if parameter.grad is not None
    }

    tower.zero_grad()
    first = torch.from_numpy(plan.first_frame)
    states = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        states = layer(states, None)
        states = torch.where(repeats[..., None], states[first], states)
    (states * weight).sum().backward()
    assert len(found) > 60
    for name, parameter in tower.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-3, rtol=1e-3)


REUSE = {"vision_reuse_layer": 1, "vision_reuse_threshold": 0.9}
NOT_SHORTENED = {"outer_method": "none", "inner_method": "none"}


def still_video(num_frames: int, seed: int) -> torch.Tensor:
    """(F, 3, 32, 32): a quarter changes, the rest stays."""
    return make_video(num_frames, seed, change=0.0)


@torch.no_grad()
def overwritten_features(model, pixels: torch.Tensor):
    """Features, importance and keys of one video from the tower that overwrites."""
    settings = HoliTomConfig(**REUSE)
    tower, model = model.model.vision_tower, model.model
    hidden, repeats = overwritten(tower, pixels, [len(pixels)], settings)
    features = model.apply_pooling(model.multi_modal_projector(hidden[-1])).flatten(0, 1)
    received, keys = vision_importance(tower.encoder.layers[-1], hidden[-2])
    return (
        torch.cat([features, model.image_newline[None]]),
        model.apply_pooling(received[..., None])[..., 0],
        model.apply_pooling(keys),
        repeats,
    )


@pytest.mark.parametrize("vision_batch_size", [None, 2])
def test_features_and_importance_have_full_length(model, vision_batch_size):
    videos = [still_video(6, seed=1), still_video(3, seed=2), still_video(1, seed=3)]
    with torch.inference_mode():
        found = model.get_video_features(videos, vision_batch_size=vision_batch_size, holitom_config=REUSE)
    for v, pixels in enumerate(videos):
        features, importance, keys, repeats = overwritten_features(model, pixels)
        assert torch.equal(found.computed_patches[v], ~repeats)
        torch.testing.assert_close(found.pooler_output[v], features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.importance[v], importance, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.attention_keys[v], keys, atol=1e-5, rtol=1e-4)
    assert found.computed_patches[0].float().mean() < 0.7


def test_the_towers_own_outputs_can_be_asked_for(model):
    pixels = still_video(4, seed=1)
    hidden, _ = overwritten(model.model.vision_tower, pixels, [4], HoliTomConfig(**REUSE))
    with torch.inference_mode():
        found = model.get_video_features(pixels[None], output_hidden_states=True, holitom_config=REUSE)
        normed = model.model.vision_tower.post_layernorm(hidden[-1])
        some = model.get_video_features(pixels[None], output_hidden_states=[-2], holitom_config=REUSE)
    torch.testing.assert_close(found.last_hidden_state, normed, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(found.hidden_states, hidden, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert [state is not None for state in some.hidden_states] == [False, False, True, False]


@pytest.mark.parametrize("feature_layers", [[-1, 2], [1, 3], [-2]])
def test_features_of_several_layers(model, feature_layers):
    other = copy.deepcopy(model)
    width = len(feature_layers) * 32
    other.model.multi_modal_projector.linear_1 = torch.nn.Linear(width, 32)
    pixels = still_video(5, seed=4)
    hidden, _ = overwritten(other.model.vision_tower, pixels, [5], HoliTomConfig(**REUSE))
    with torch.inference_mode():
        projected = other.model.multi_modal_projector(torch.cat([hidden[index] for index in feature_layers], dim=-1))
        expected = other.model.apply_pooling(projected).flatten(0, 1)
        found = other.get_video_features(pixels[None], vision_feature_layer=feature_layers, holitom_config=REUSE)
    torch.testing.assert_close(found.pooler_output[0, :-1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", [{}, NOT_SHORTENED], ids=["compressed", "whole"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_over_what_changes(model, decoder, num_beams):
    videos = [still_video(6, seed=1), still_video(3, seed=2)]
    prompts = [make_prompt(3, "video:6", 4), make_prompt(2, "video:3", 3)]
    kwargs = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams, "holitom_config": REUSE | decoder}
    ids, mask = pad_batch(prompts)
    together = model.generate(input_ids=ids, attention_mask=mask, pixel_values_videos=videos, **kwargs)
    for row, (prompt, pixels) in enumerate(zip(prompts, videos)):
        features, importance, keys, _ = overwritten_features(model, pixels)
        encoded = HoliTomVideoFeatures(pooler_output=features[None], importance=[importance], attention_keys=[keys])
        expected = model.generate(
            input_ids=prompt[None],
            mm_encoder_outputs={"video": encoded},
            **kwargs | {"holitom_config": decoder | {"vision_reuse_layer": None}},
        )
        alone = model.generate(input_ids=prompt[None], pixel_values_videos=pixels[None], **kwargs)
        assert torch.equal(alone, expected)
        assert torch.equal(together[row, -4:], expected[0, -4:])


def test_operations_fall_with_the_patches(model):
    def operations(pixels, holitom_config):
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.get_video_features(pixels[None], holitom_config=NOT_SHORTENED | holitom_config)
        return counter.get_total_flops()

    pixels = still_video(1, seed=1).expand(8, -1, -1, -1)
    one, whole = operations(pixels[:1], {}), operations(pixels, {})
    assert whole == 8 * one
    # The first layer and what decides run for all frames, the other two and the projector for one.
    embedding_and_layer = 2 * 64 * (3 * 16 * 32 + 4 * 32 * 32 + 2 * 32 * 64) + 4 * 64 * 64 * 32
    deciding = 64 * 2 * 32 * 8 * 8
    assert operations(pixels, REUSE) == one + 7 * embedding_and_layer + deciding


def test_settings_that_do_not_fit_the_tower_say_so(model):
    pixels = still_video(2, seed=0)[None]
    with pytest.raises(ValueError, match=r"vision_reuse_layer is 3, but features are taken after layer 3.*1 to 2"):
        model.get_video_features(pixels, holitom_config={"vision_reuse_layer": 3})
    with pytest.raises(ValueError, match="vision_reuse_layer must be an integer >= 1 or None, got 0"):
        HoliTomConfig(vision_reuse_layer=0)
    with pytest.raises(ValueError, match=r"vision_reuse_threshold must be a number in \[-1, 1\], got 1.5"):
        HoliTomConfig(vision_reuse_threshold=1.5)


def test_a_tower_of_another_kind_is_named():
    config = copy.deepcopy(SMALL)
    config["vision_config"] |= {"model_type": "clip_vision_model", "projection_dim": 32}
    model = HoliTomLlavaOnevisionModel(
        HoliTomLlavaOnevisionConfig(**config, holitom_config={"inner_merge_layer": 2})
    ).eval()
    with pytest.raises(ValueError, match="needs a SigLIP vision tower, this model's is a CLIPVisionModel"):
        model.get_video_features(still_video(2, seed=0)[None], holitom_config=REUSE)


def test_no_piece_has_more_frames_than_may_exist_at_once():
    """Keys and values, importance's queries and keys, and what is projected exist at all places of a piece."""
    pixels = random_video(1).expand(40, -1, -1, -1)
    _, _, parts = packed(random_tower(), pixels, [40], HoliTomConfig(vision_reuse_layer=1), frames_at_once=4)
    assert max(len(part.slot) for part in parts) <= 4


def test_a_piece_computes_nothing_twice_that_it_does_not_use(monkeypatch):
    monkeypatch.setattr(patches, "DENSE_SHARE", 0.0)
    states = torch.randn(1, 8, 16).expand(6, -1, -1)
    plan = plan_patches(states, [6], HoliTomConfig(vision_reuse_layer=1))
    assert plan.is_dense
    assert [piece.num_carried for piece in plan.pieces(1)] == [0] * 6


def test_a_layer_that_saves_nothing_is_told_whatever_is_returned(model):
    """Features are taken after layer 2 of 3: nothing is left to leave out after `vision_reuse_layer` 2."""
    for return_vision_states in (False, True):
        with pytest.raises(ValueError, match="choose 1 to 1"):
            model.get_video_features(
                [make_video(3, seed=0)],
                vision_feature_layer=-2,
                holitom_config={"vision_reuse_layer": 2},
                return_vision_states=return_vision_states,
            )


def test_attentions_that_cannot_be_returned_are_refused(model):
    with pytest.raises(ValueError, match="attentions"):
        model.get_video_features(
            [make_video(3, seed=0)], output_attentions=True, holitom_config={"vision_reuse_layer": 1}
        )


def test_a_plan_follows_the_layers_to_their_device():
    plan = PatchPlan.of(torch.ones(2, 3, dtype=torch.bool), [0, 1])
    assert plan.to("cpu") is plan
    assert plan.to("meta").slot.device.type == "meta"
    assert plan.to("meta") is plan.to("meta")


def test_compiled_layers_give_the_same():
    tower, settings = random_tower(), HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9)
    pixels = random_video(9, seed=2)
    _, expected, _ = packed(tower, pixels, [9], settings)
    for layer in tower.encoder.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    _, found, _ = packed(tower, pixels, [9], settings)
    torch.testing.assert_close(found[-1], expected[-1], atol=5e-6, rtol=1e-4)
