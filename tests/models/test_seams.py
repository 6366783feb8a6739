"""
What other backbones need of the compressing forward: tokens at places of their own, several position axes, further
feature maps. Made of LLaVA-OneVision's tower and other decoders, and compared with sequences put together by hand.
"""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration, HoliTomLlavaOnevisionModel
from holitom_hf.merging import VideoTokens, merge_video_tokens
from holitom_hf.merging.merged_video import MergedVideo
from holitom_hf.models.compression import in_slot_order
from holitom_hf.models.decoder import HoliTomDecoderMixin
from holitom_hf.sequence.compaction import compact_prompt

from ..conftest import TOKENS_PER_FRAME, VIDEO_TOKEN, make_video, pad_batch


SETTINGS = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.3, inner_merge_layer=None)


class OwnPlacesModel(HoliTomLlavaOnevisionModel):
    """Each token takes the placeholder and the position of the place it stands for."""

    has_position_gaps = True

    def token_slots(self, merged, video):
        return merged.place

    def renumbered(self, positions, is_dropped):
        return positions


class OwnPlaces(HoliTomLlavaOnevisionForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnPlacesModel(config)
        self.post_init()


@pytest.fixture(scope="module")
def own_places(model):
    other = OwnPlaces(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def interleaved_prompt(num_frames: int, seed: int = 0) -> torch.Tensor:
    """(L,) ids with text before every frame's placeholders, as models with time stamps have it."""
    random = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, 110, (length,), generator=random)

    parts = [text(3)]
    for frame in range(num_frames):
        parts += [torch.full((TOKENS_PER_FRAME + (frame == num_frames - 1),), VIDEO_TOKEN), text(2)]
    return torch.cat([*parts, text(4)])


@torch.no_grad()
def kept_places(model, ids: torch.Tensor, video: torch.Tensor, settings=SETTINGS):
    """Of one row: its embeddings with merged tokens in their own places, and which of the L places are left."""
    core = model.model
    encoded = core.get_video_features(video[None], holitom_config=settings)
    features = encoded.pooler_output[0]
    frames = features[:-1].view(len(video), TOKENS_PER_FRAME, -1)
    merged = merge_video_tokens(frames, encoded.importance[0], settings)
    placeholders = (ids == VIDEO_TOKEN).nonzero()[:, 0]
    embeds = core.get_input_embeddings()(ids)
    for token in range(merged.num_tokens):
        embeds[placeholders[merged.frame[token] * TOKENS_PER_FRAME + merged.position[token]]] = merged.embeddings[
            token
        ]
    embeds[placeholders[-1]] = features[-1]
    left = {int(placeholders[f * TOKENS_PER_FRAME + p]) for f, p in zip(merged.frame, merged.position)}
    left |= set((ids != VIDEO_TOKEN).nonzero()[:, 0].tolist()) | {int(placeholders[-1])}
    return embeds, torch.tensor(sorted(left))


@torch.no_grad()
def plain_logits(model, upstream, ids, video, settings=SETTINGS) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, left = kept_places(model, ids, video, settings)
    decoder = upstream.model.language_model
    hidden = decoder(
        inputs_embeds=embeds[left][None],
        position_ids=left[None],
        attention_mask=torch.ones(1, len(left)),  # else upstream takes gaps for packed rows
        use_cache=False,
    ).last_hidden_state
    return upstream.lm_head(hidden)[0], left


class TestOwnPlaces:
    @pytest.mark.parametrize("num_frames", [2, 5])
    def test_text_between_frames(self, own_places, upstream, num_frames):
        ids, video = interleaved_prompt(num_frames), make_video(num_frames, seed=num_frames)
        expected, left = plain_logits(own_places, upstream, ids, video)
        inputs = {"input_ids": ids[None], "pixel_values_videos": video[None], "holitom_config": SETTINGS}
        with torch.no_grad():
            outputs = own_places(**inputs)
            without_cache = own_places(**inputs, use_cache=False)
        torch.testing.assert_close(without_cache.logits, outputs.logits, atol=1e-5, rtol=1e-4)
        assert len(left) < 0.6 * len(ids)
        torch.testing.assert_close(outputs.logits[0, left], expected, atol=1e-5, rtol=1e-4)
        assert (outputs.merged_videos[0][0].place.diff() > 0).all(), "the record is in the order of the prompt"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_of_a_batch(self, own_places, upstream, side):
        prompts = [interleaved_prompt(4, seed=1), interleaved_prompt(2, seed=2)]
        videos = [make_video(4, seed=3), make_video(2, seed=4)]
        ids, mask = pad_batch(prompts, side)
        with torch.no_grad():
            outputs = own_places(
                input_ids=ids, attention_mask=mask, pixel_values_videos=videos, holitom_config=SETTINGS
            )
        for row, (prompt, video) in enumerate(zip(prompts, videos)):
            expected, left = plain_logits(own_places, upstream, prompt, video)
            logits = outputs.logits[row, mask[row].bool()]
            torch.testing.assert_close(logits[left], expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_generate_goes_on_behind_the_full_length(self, own_places, upstream, num_beams):
        prompts, video = [interleaved_prompt(4, seed=5), interleaved_prompt(3, seed=6)], make_video(4, seed=7)
        videos = [video, video[:3]]
        ids, mask = pad_batch(prompts)
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "holitom_config": SETTINGS}
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": videos}
        with_cache = own_places.generate(**inputs, **options)
        assert torch.equal(with_cache, own_places.generate(**inputs, **options, use_cache=False))
        if num_beams == 1:
            for row, prompt in enumerate(prompts):
                tokens = prompt
                for _ in range(5):
                    logits, _ = plain_logits(own_places, upstream, tokens, videos[row])
                    tokens = torch.cat([tokens, logits[-1].argmax()[None]])
                assert with_cache[row, ids.shape[1] :].tolist() == tokens[-5:].tolist()

    def test_a_second_turn_goes_on_from_the_record(self, own_places, upstream):
        first, video = interleaved_prompt(4, seed=8), make_video(4, seed=9)
        more = torch.randint(3, 110, (6,), generator=torch.Generator().manual_seed(1))
        cache = DynamicCache()
        with torch.no_grad():
            own_places(
                input_ids=first[None],
                pixel_values_videos=video[None],
                cache=cache,
                holitom_config=SETTINGS,
            )
            record = cache.compressed_sequence
            assert record.next_position.tolist() == [[len(first)]]
            assert record.position_offset.tolist() == [0]
            parts = [own_places(input_ids=part[None], cache=cache).logits for part in more.split([1, 3, 2])]
        expected, left = plain_logits(own_places, upstream, torch.cat([first, more]), video)
        torch.testing.assert_close(torch.cat(parts, 1)[0], expected[left >= len(first)], atol=1e-5, rtol=1e-4)

    def test_stage_3_with_cache_and_without(self, own_places):
        settings = HoliTomConfig(retention_ratio=0.4, similarity_threshold=0.3, inner_merge_layer=2)
        ids, video = interleaved_prompt(5, seed=10)[None], make_video(5, seed=11)[None]
        options = {"max_new_tokens": 4, "do_sample": False, "holitom_config": settings}
        answers = [
            own_places.generate(ids, pixel_values_videos=video, use_cache=use_cache, **options)
            for use_cache in (True, False)
        ]
        assert torch.equal(*answers)

    def test_positions_of_the_caller_count_as_before(self, own_places):
        ids, video = interleaved_prompt(3, seed=12)[None], make_video(3, seed=13)[None]
        inputs = {"input_ids": ids, "pixel_values_videos": video, "holitom_config": SETTINGS}
        with torch.no_grad():
            given = own_places(**inputs, position_ids=torch.arange(ids.shape[1])[None]).logits
            assert torch.equal(given, own_places(**inputs).logits)


def with_decoder(model, decoder_class, config, axes: int, **hooks):
    """A model of ours with another decoder and hooks, over the same tower."""

    class Decoder(HoliTomDecoderMixin, decoder_class):
        num_position_axes = axes

    torch.manual_seed(3)
    other = copy.deepcopy(model.model)
    other.language_model = Decoder._from_config(config).eval()
    other.__class__ = type("Other", (OwnPlacesModel,), hooks)
    upstream = decoder_class._from_config(config).eval()
    upstream.load_state_dict(other.language_model.state_dict())
    return other, upstream


SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def grid_positions(self, start, is_real, input_ids, **_):
    """(3, B, L): text on all axes alike, tokens by frame, row and column, text behind from the largest on."""
    rows = []
    for row, ids in enumerate(input_ids.tolist()):
        place, position, number = int(start[row]), [], 0
        for index, token in enumerate(ids):
            if not is_real[row, index]:
                position.append((0, 0, 0))
            elif token == VIDEO_TOKEN:
                frame, rest = divmod(number, TOKENS_PER_FRAME)
                position.append((place + frame, place + rest // 4, place + rest % 4))
                number += 1
            else:
                if index and ids[index - 1] == VIDEO_TOKEN:
                    place = max(max(p) for p in position) + 1
                position.append((place,) * 3)
                place += 1
        rows.append(position)
    return torch.tensor(rows).permute(2, 0, 1)


def call(model, ids, settings=SETTINGS, position_inputs=None, cache=None, **inputs):
    """The compressing forward, as a backbone's forward calls it."""
    encoders = {}
    if "video" in inputs:
        encode = lambda: model.get_video_features(inputs["video"], holitom_config=settings)  # noqa: E731
        encoders["video"] = ("pixel_values_videos", encode)
    return model.compressing_forward(
        ids,
        None,
        inputs.get("mask"),
        None,
        cache,
        cache is not None,
        None,
        encoders,
        settings,
        position_inputs=position_inputs,
    )


@torch.no_grad()
def test_positions_of_three_axes(model):
    config = Qwen2_5_VLTextConfig(**SIZES, rope_parameters=ROPE)
    other, upstream = with_decoder(model, Qwen2_5_VLTextModel, config, 3, full_positions=grid_positions)
    ids, video = interleaved_prompt(4, seed=14), make_video(4, seed=15)
    cache = DynamicCache()
    outputs = call(other, ids[None], position_inputs={"input_ids": ids[None]}, video=video[None], cache=cache)

    holder = type("Holder", (), {"model": other})
    embeds, left = kept_places(holder, ids, video)
    full = grid_positions(None, torch.zeros(1, 1), torch.ones(1, len(ids)), ids[None])
    expected = upstream(inputs_embeds=embeds[left][None], position_ids=full[:, :, left], use_cache=False)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)

    record = cache.compressed_sequence
    assert record.next_position.tolist() == [[int(full[0, 0, -1]) + 1]] != [[len(ids)]]
    more = torch.randint(3, 110, (3,), generator=torch.Generator().manual_seed(2))
    later = call(other, more[None], cache=cache)
    everything = torch.cat([embeds[left], other.get_input_embeddings()(more)])[None]
    behind = (full[..., -1:] + 1 + torch.arange(3)).expand(3, 1, 3)
    places = torch.cat([full[:, :, left], behind], -1)
    expected = upstream(inputs_embeds=everything, position_ids=places, use_cache=False).last_hidden_state[:, -3:]
    torch.testing.assert_close(later.last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def features_as_maps(self, video) -> list[VideoTokens]:
    """Two further maps, which a vision tower of DeepStack would give: here, made from the features."""
    videos = HoliTomLlavaOnevisionModel.video_tokens(self, video)
    for tokens in videos:
        tokens.maps = (tokens.features.sin(), tokens.features.cos())
        tokens.newline = None
    return videos


def deepstack(self, maps, video_mask, image=None, image_mask=None):
    return {"visual_pos_masks": video_mask, "deepstack_visual_embeds": maps}


@pytest.mark.parametrize("inner_layer", [None, 1, 2, 3])
@torch.no_grad()
def test_further_maps_are_merged_alike_and_reach_the_decoder(model, inner_layer):
    config = Qwen3VLTextConfig(**SIZES, head_dim=8, rope_parameters=ROPE | {"mrope_interleaved": True})
    hooks = {"video_tokens": features_as_maps, "decoder_inputs": deepstack, "full_positions": grid_positions}
    other, upstream = with_decoder(model, Qwen3VLTextModel, config, 3, **hooks)
    video = make_video(4, seed=17)
    ids = interleaved_prompt(4, seed=16)
    newline = (ids == VIDEO_TOKEN).nonzero()[-1]
    ids = torch.cat([ids[:newline], ids[newline + 1 :]])  # this backbone has no newline
    settings = HoliTomConfig(retention_ratio=0.4, similarity_threshold=0.3, inner_merge_layer=inner_layer)
    outputs = call(other, ids[None], settings, {"input_ids": ids[None]}, video=video[None])

    encoded = other.get_video_features(video[None], holitom_config=settings)
    frames = encoded.pooler_output[0][:-1].view(4, TOKENS_PER_FRAME, -1)
    merged = merge_video_tokens(frames, encoded.importance[0], settings)
    slots, order = merged.place.sort()
    placeholders = (ids == VIDEO_TOKEN).nonzero()[:, 0]
    embeds = other.get_input_embeddings()(ids)
    embeds[placeholders[slots]] = merged.embeddings[order]
    is_left = ids != VIDEO_TOKEN
    is_left[placeholders[slots]] = True
    mask = (ids == VIDEO_TOKEN)[is_left][None]
    maps = [merged.apply(frames.sin())[order], merged.apply(frames.cos())[order]]
    positions = grid_positions(None, torch.zeros(1, 1), torch.ones(1, len(ids)), ids[None])[:, :, is_left]
    if inner_layer is None:
        expected = upstream(
            inputs_embeds=embeds[is_left][None],
            position_ids=positions,
            use_cache=False,
            visual_pos_masks=mask,
            deepstack_visual_embeds=maps,
        )
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
        return
    # With stage 3: the same layers by hand, dropping what the model says it dropped, before the layer it says.
    keep, hidden, alive = outputs.inner_keep[0], embeds[is_left][None], torch.arange(int(is_left.sum()))
    folded = HoliTomConfig(**settings.to_dict() | {"inner_method": "prune"})
    outputs = call(other, ids[None], folded, {"input_ids": ids[None]}, video=video[None])
    assert outputs.inner_keep[0].tolist() == keep.tolist()
    features = [torch.zeros_like(hidden[0]).masked_scatter(mask[0, :, None], values) for values in maps]
    for index, layer in enumerate(upstream.layers):
        if index == inner_layer:
            hidden, alive = hidden[:, keep], keep
        rotary = upstream.rotary_emb(hidden, positions[:, :, alive])
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        hidden = hidden + features[index][alive] if index < 2 else hidden
    torch.testing.assert_close(outputs.last_hidden_state, upstream.norm(hidden), atol=1e-5, rtol=1e-4)


def test_slots_are_what_compaction_keeps():
    """Two videos, one with slots of its own and one without, worked out by hand."""
    video_mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    inputs_embeds = torch.arange(11.0)[None, :, None]
    tokens = [torch.tensor([[101.0], [103.0]]), torch.tensor([[201.0], [202.0]])]
    prompt = compact_prompt(
        inputs_embeds, video_mask, torch.ones_like(video_mask), tokens, [4, 3], [torch.tensor([1, 3]), None]
    )
    assert prompt.embeds[0, :, 0].tolist() == [0, 101, 3, 103, 6, 201, 202, 10]
    assert prompt.packed.row(0).tolist() == [0, 2, 3, 5, 6, 7, 8, 10]
    assert prompt.is_dropped[0].nonzero()[:, 0].tolist() == [1, 4, 9]
    assert prompt.video_mask[0].tolist() == [False, True, False, True, False, True, True, False]


def test_tokens_are_sorted_by_slot_and_a_newline_stays_behind():
    assignment = torch.tensor([[2, -1], [0, 1]])
    video = MergedVideo(
        torch.tensor([[10.0], [11.0], [12.0]]),
        [(0, 2)],
        1.0,
        frame=torch.tensor([1, 1, 0]),
        position=torch.tensor([0, 1, 0]),
        kind=torch.ones(3, dtype=torch.long),
        assignment=assignment,
    )
    tokens = torch.cat([video.embeddings, torch.tensor([[99.0]])])
    [merged], [embeddings], [slots] = in_slot_order([video], [tokens], [video.place])
    assert slots.tolist() == [0, 2, 3, 4]
    assert embeddings[:, 0].tolist() == [12, 10, 11, 99]
    assert merged.embeddings[:, 0].tolist() == [12, 10, 11]
    assert merged.assignment.tolist() == [[0, -1], [1, 2]]
    assert in_slot_order([video], [tokens], [None])[0][0] is video
