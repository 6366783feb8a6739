"""Qwen3-VL: off it is upstream's class to the bit, on it is the plain loop over upstream's parts."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from holitom_hf import HoliTomConfig
from holitom_hf.merging.merged_video import TokenKind
from holitom_hf.models.qwen3_vl.configuration import HoliTomQwen3VLConfig
from holitom_hf.models.qwen3_vl.modeling import HoliTomQwen3VLForConditionalGeneration
from holitom_hf.models.upstream import CACHE_NAME, cache_of

from .qwen import (
    IMAGE,
    QWEN3_VL,
    VIDEO,
    VISION_END,
    VISION_START,
    PlainQwen,
    inputs_of,
    make_prompt,
    media,
    plain_generator,
    token_types,
    video,
)


OFF = HoliTomConfig(retention_ratio=1.0, inner_merge_layer=None)
ON = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.3, inner_merge_layer=2)
GRIDS = [(4, 4, 8), (3, 8, 4)]
PROMPTS = [make_prompt(3, GRIDS[0], 8, seed=21), make_prompt(2, GRIDS[1], 3, seed=22)]
VIDEOS = [video(GRIDS[0], 23), video(GRIDS[1], 24)]
NEW = 6
# Models with random weights also emit placeholders, for which no oracle has an image.
TEXT_ONLY = {"max_new_tokens": NEW, "suppress_tokens": [VISION_START, VISION_END, IMAGE, VIDEO]}
GREEDY = {"do_sample": False} | TEXT_ONLY


@pytest.fixture(scope="module")
def model() -> HoliTomQwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    return HoliTomQwen3VLForConditionalGeneration(HoliTomQwen3VLConfig(**QWEN3_VL, holitom_config=ON)).eval()


@pytest.fixture(scope="module")
def upstream(model) -> Qwen3VLForConditionalGeneration:
    upstream = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**QWEN3_VL)).eval()
    upstream.load_state_dict(model.state_dict())
    return upstream


@pytest.fixture(scope="module")
def plain(model) -> PlainQwen:
    return PlainQwen(model, Qwen3VLForConditionalGeneration, Qwen3VLConfig(**QWEN3_VL))


@pytest.fixture(scope="module", params=["all stages", "stage 3 early", "no stage 3", "kept and sized"])
def used(request, model):
    changes = {
        "all stages": {},
        "stage 3 early": {"inner_merge_layer": 1},
        "no stage 3": {"inner_merge_layer": None},
        "kept and sized": {"position_ids": "kept", "proportional_attention": True, "inner_merge_layer": 4},
    }[request.param]
    model.config.holitom_config = replace(ON, **changes)
    yield model.config.holitom_config
    model.config.holitom_config = ON


@pytest.fixture
def batch() -> dict:
    return inputs_of(PROMPTS, VIDEOS)


@pytest.fixture
def single() -> dict:
    return inputs_of(PROMPTS[:1], VIDEOS[:1])


@pytest.fixture(scope="module")
def reference(plain, used):
    return plain_generator(plain, PROMPTS, [[video] for video in VIDEOS], used)


def text_only(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


def expected(reference, inputs: dict, **kwargs):
    torch.manual_seed(5)
    return reference.generate(**text_only(inputs), **kwargs, use_cache=False)


IMAGES = [video((1, 4, 4), 31), video((1, 4, 8), 32)]
CASES = {
    "text": lambda: inputs_of([make_prompt(9), make_prompt(5)]),
    "images": lambda: inputs_of([make_prompt(2, (4, 4), 3), make_prompt((4, 8), 9)], images=IMAGES),
    "a video": lambda: inputs_of(PROMPTS[:1], VIDEOS[:1]),
    "videos of two grids": lambda: inputs_of(PROMPTS, VIDEOS),
    "right padding": lambda: inputs_of(PROMPTS, VIDEOS, side="right"),
    "images and videos": lambda: inputs_of(
        [make_prompt(2, (4, 4), 1, GRIDS[0], 3), make_prompt(GRIDS[1], 2, (4, 8), 2)], VIDEOS, IMAGES
    ),
}


class TestOff:
    @pytest.mark.parametrize("case", CASES)
    @torch.no_grad()
    def test_logits_are_upstreams_to_the_bit(self, model, upstream, case):
        inputs = CASES[case]()
        ours, theirs = model(**inputs, holitom_config=OFF), upstream(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.merged_videos is None

    @pytest.mark.parametrize("case", [case for case in CASES if case != "right padding"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
    def test_generate_is_upstreams(self, model, upstream, case, options):
        options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True} | options
        wanted = {"output_logits": True} | options
        torch.manual_seed(1)
        ours = model.generate(**CASES[case](), holitom_config=OFF, **wanted)
        torch.manual_seed(1)
        theirs = upstream.generate(**CASES[case](), **wanted)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))

    @pytest.mark.parametrize("case", CASES)
    def test_loss_and_gradients_are_upstreams(self, model, upstream, case):
        inputs = CASES[case]()
        labels = inputs["input_ids"].clone()
        labels[:, :3] = -100
        ours = model(**inputs, labels=labels, holitom_config=OFF, use_cache=False).loss
        theirs = upstream(**inputs, labels=labels, use_cache=False).loss
        assert torch.equal(ours, theirs)
        name = "model.visual.blocks.0.attn.qkv.weight" if "video" in case else "lm_head.weight"
        gradients = [
            torch.autograd.grad(loss, m.get_parameter(name))[0] for loss, m in ((ours, model), (theirs, upstream))
        ]
        assert torch.equal(*gradients)


class TestEncoding:
    """What travels with the features."""

    @torch.no_grad()
    def test_features_importance_and_maps(self, model, upstream, plain):
        inputs = media(VIDEOS)
        ours, theirs = model.get_video_features(**inputs), upstream.get_video_features(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours.pooler_output, theirs.pooler_output, strict=True))
        for a, b in zip(ours.deepstack_features, theirs.deepstack_features, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for found, each in zip(ours.importance, VIDEOS, strict=True):
            torch.testing.assert_close(found, plain.importance(*each), atol=1e-7, rtol=1e-5)
        assert [tuple(keys.shape) for keys in ours.attention_keys] == [(4, 8, 16), (3, 8, 16)]
        assert ours.grids == GRIDS

    @pytest.mark.parametrize("at_once", [1, 2, 3, 100])
    @torch.no_grad()
    def test_chunks_of_temporal_patches_change_nothing(self, model, at_once):
        inputs = media([*VIDEOS, video((1, 4, 4), 25)])
        whole = model.get_video_features(**inputs, output_hidden_states=True)
        parts = model.get_video_features(**inputs, output_hidden_states=True, vision_batch_size=at_once)
        for name in ("pooler_output", "importance", "attention_keys", "hidden_states"):
            for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        for a, b in zip(whole.deepstack_features, parts.deepstack_features, strict=True):
            torch.testing.assert_close(torch.cat(a), torch.cat(b), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.last_hidden_state, parts.last_hidden_state, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_hidden_states_are_those_asked_for(self, model, upstream):
        inputs = media(VIDEOS)
        assert model.get_video_features(**inputs).hidden_states is None
        ours = model.get_video_features(**inputs, output_hidden_states=True).hidden_states
        theirs = upstream.get_video_features(**inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @torch.no_grad()
    def test_encoded_before(self, model, used, batch):
        encoded = model.get_video_features(**media(VIDEOS))
        inputs = {n: v for n, v in batch.items() if "video" not in n} | {"mm_encoder_outputs": {"video": encoded}}
        assert torch.equal(model(**copy.deepcopy(inputs)).logits, model(**batch).logits)
        assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**batch, **GREEDY))

    def test_what_does_not_fit_is_said(self, model, upstream, single):
        with pytest.raises(ValueError, match="vision tower of Qwen3-VL has 4 layers: choose 1 to 3"):
            model(**single, holitom_config={"vision_reuse_layer": 4})
        with pytest.raises(ValueError, match="without mm_token_type_ids"):
            model(**{name: value for name, value in single.items() if name != "mm_token_type_ids"})
        with pytest.raises(ValueError, match="without mm_token_type_ids"):
            model.generate(**{name: value for name, value in single.items() if name != "mm_token_type_ids"})
        with pytest.raises(ValueError, match=r"shape \(1, 5\), for 59 new tokens"):
            model(**single | {"mm_token_type_ids": torch.zeros(1, 5, dtype=torch.int)})
        with pytest.raises(ValueError, match=r"must have shape \(videos, 3\), got None"):
            model(**{name: value for name, value in single.items() if name != "video_grid_thw"})
        with pytest.raises(ValueError, match="is that of 96 flat patches"):
            model(**single | {"video_grid_thw": torch.tensor([[3, 4, 8]])})
        with pytest.raises(ValueError, match="both sides must be multiples of 2"):
            model(**single | {"video_grid_thw": torch.tensor([[4, 1, 32]])})
        with pytest.raises(ValueError, match="row 0 of the prompt has 32 video placeholders, but its videos need 24"):
            model(**single | media([video((3, 4, 8), 1)]))
        with pytest.raises(ValueError, match="row 0 of the prompt has 32 video placeholders, but its videos need 24"):
            model.generate(**single | media([video((3, 4, 8), 1)]))
        with pytest.raises(ValueError, match="more images or videos than grids"):
            model(**inputs_of([make_prompt((4, 4), GRIDS[0], (4, 4))], VIDEOS[:1], IMAGES[:1]))
        with pytest.raises(ValueError, match="vision_batch_size must be at least 1"):
            model(**single, vision_batch_size=0)
        broken = single["pixel_values_videos"].clone()
        broken[70, 3] = torch.nan
        with pytest.raises(ValueError, match="video 0 has NaN or infinite pixels in frame 2"):
            model(**single | {"pixel_values_videos": broken})
        encoded = upstream.get_video_features(**media(VIDEOS[:1]))
        inputs = {n: v for n, v in single.items() if n != "pixel_values_videos"}
        with pytest.raises(ValueError, match="the encoded videos carry no grids"):
            model(**inputs, mm_encoder_outputs={"video": encoded})


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "sampling, several sequences": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam search, several sequences": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5},
}


class TestGenerating:
    @pytest.mark.parametrize("mode", MODES)
    def test_modes(self, model, used, reference, batch, mode):
        torch.manual_seed(5)
        outputs = model.generate(**batch, **MODES[mode], **TEXT_ONLY)
        assert torch.equal(outputs, expected(reference, batch, **MODES[mode], **TEXT_ONLY))

    @pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
    @pytest.mark.parametrize("which", ["batch", "single"])
    def test_caches(self, model, reference, request, options, which):
        inputs = request.getfixturevalue(which)
        outputs = model.generate(**inputs, **options, **GREEDY)
        assert torch.equal(outputs, expected(reference, inputs, **GREEDY))

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_logits_of_every_position(self, model, plain, used, side):
        inputs = inputs_of(PROMPTS, VIDEOS, side=side)
        outputs = model(**inputs)
        for row, prompt in enumerate(PROMPTS):
            wanted = plain.logits(prompt, [plain.encode(*VIDEOS[row], used)], used, videos=[VIDEOS[row]])
            found = outputs.logits[row, inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        merged = outputs.merged_videos[0][0]
        assert merged.num_tokens < 0.6 * merged.num_input_tokens
        assert (merged.place.diff() > 0).all()

    def test_right_padding_goes_on_behind_each_row(self, model, reference):
        """Upstream's own count goes on from the padding."""
        inputs = inputs_of(PROMPTS, VIDEOS, side="right")
        with torch.no_grad():
            outputs = model(**inputs, use_cache=True)
        record = cache_of(outputs).compressed_sequence
        alone = []
        for row, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                lone = model(**inputs_of([prompt], [VIDEOS[row]]), use_cache=True)
            alone.append(cache_of(lone).compressed_sequence.next_position[0])
        assert record.next_position.tolist() == torch.stack(alone).tolist()

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementations(self, model, reference, batch, implementation):
        other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=implementation).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.generate(**batch, **GREEDY), expected(reference, batch, **GREEDY))

    @pytest.mark.parametrize("kind", ["prompt lookup", "the model itself", "upstream's class"])
    def test_assisted_decoding(self, model, upstream, reference, single, kind):
        options = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "the model itself": {"assistant_model": model},
            "upstream's class": {"assistant_model": upstream},
        }[kind]
        outputs = model.generate(**single, **options, **GREEDY)
        assert torch.equal(outputs, expected(reference, single, **GREEDY))

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_images_beside_videos_and_several_videos(self, model, plain, used, num_beams):
        prompts = [make_prompt(2, (4, 4), 1, GRIDS[0], 3, GRIDS[1], 2), make_prompt(1, GRIDS[1], 4, (4, 8), 2)]
        videos = [[*VIDEOS], [video(GRIDS[1], 40)]]
        images = [IMAGES[:1], IMAGES[1:]]
        inputs = inputs_of(prompts, [v for row in videos for v in row], IMAGES)
        options = GREEDY | {"num_beams": num_beams}
        reference = plain_generator(plain, prompts, videos, used, images=images)
        assert torch.equal(model.generate(**inputs, **options), expected(reference, inputs, **options))

    def test_embeddings_in_place_of_ids(self, model, used, single):
        embeds = model.get_input_embeddings()(single["input_ids"]).detach()
        inputs = {name: value for name, value in single.items() if name != "input_ids"}
        outputs = model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
        assert torch.equal(outputs, model.generate(**single, **GREEDY)[:, -NEW:])

    @torch.no_grad()
    def test_a_record_of_what_was_done(self, model, used, batch):
        outputs = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        assert [len(row) for row in outputs.merged_videos] == [1, 1]
        off = model.generate(**batch, **GREEDY, return_dict_in_generate=True, holitom_config=OFF)
        assert off.merged_videos is None

    @torch.no_grad()
    def test_step_by_step_without_position_ids(self, model, plain, used):
        ids = torch.cat([PROMPTS[0], make_prompt(6, seed=50)])
        cache, length = DynamicCache(), len(PROMPTS[0])
        model(**inputs_of(PROMPTS[:1], VIDEOS[:1]), cache=cache)
        found = torch.cat(
            [model(input_ids=part[None], cache=cache).logits for part in ids[length:].split([1, 3, 2])], 1
        )
        wanted = plain.logits(ids, [plain.encode(*VIDEOS[0], used)], used, length, VIDEOS[:1])
        torch.testing.assert_close(found[0], wanted[length:], atol=1e-5, rtol=1e-4)


def pad_turns(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = inputs_of(rows)
    return inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))


class TestTurns:
    def caches(self, model, kind):
        return DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=200)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("lengths", [(4, 4), (7, 3)])
    def test_a_second_question_with_padding_inside(self, model, plain, used, batch, kind, lengths):
        cache = self.caches(model, kind)
        first = model.generate(**batch, **GREEDY, cache=cache)
        question, is_real = pad_turns([make_prompt(n, seed=31 + n) for n in lengths])
        ids = torch.cat([first, question], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long), is_real], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, cache=cache)
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        reference = plain_generator(
            plain, whole, [[v] for v in VIDEOS], used, prompt_lengths=[len(prompt) for prompt in PROMPTS]
        )
        assert torch.equal(second[:, -NEW:], expected(reference, inputs_of(whole), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("first_settings", ["on", "off"])
    def test_a_second_video(self, model, plain, used, batch, kind, first_settings):
        """The first turn may have been compressed or not: upstream crashes here."""
        cache = self.caches(model, kind)
        before = used if first_settings == "on" else OFF
        first = model.generate(**batch, **GREEDY, cache=cache, holitom_config=before)
        more = [[video((3, 4, 4), 33)], [video((2, 4, 8), 34), video((2, 4, 4), 35)]]
        turn, is_real = pad_turns(
            [make_prompt(2, (3, 4, 4), 5, seed=34), make_prompt((2, 4, 8), (2, 4, 4), 3, seed=35)]
        )
        ids = torch.cat([first, turn], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long), is_real], 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": token_types(ids)}
        new = media([v for row in more for v in row])
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        if first_settings == "off" and used.inner_merge_layer:
            used = replace(used, inner_merge_layer=None)
        second = model.generate(**inputs, **new, **GREEDY, cache=cache, holitom_config=used)
        videos = [[VIDEOS[row], *more[row]] for row in range(2)]
        lengths = [[len(PROMPTS[row]), *[len(whole[row])] * len(more[row])] for row in range(2)]
        reference = plain_generator(plain, whole, videos, used, lengths)
        if first_settings == "off":
            reference = off_then_on(plain, whole, videos, used, lengths)
        assert torch.equal(second[:, -NEW:], expected(reference, inputs_of(whole), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("num_beams", [1, 2])
    @pytest.mark.parametrize("given", ["all ids", "new ids"])
    def test_a_second_turn_with_an_image(self, model, plain, used, single, num_beams, given):
        cache = DynamicCache()
        first = model.generate(**single, **GREEDY, cache=cache)
        cache.batch_repeat_interleave(num_beams)
        turn = make_prompt(2, (4, 8), 4, seed=36)
        ids = torch.cat([first[0], turn])
        mask = torch.ones(1, len(ids), dtype=torch.long)
        passed = ids if given == "all ids" else ids[first.shape[1] - 1 :]
        options = GREEDY | {"num_beams": num_beams}
        second = model.generate(
            input_ids=passed[None],
            attention_mask=mask,
            mm_token_type_ids=token_types(passed)[None],
            **media(images=IMAGES[1:]),
            **options,
            cache=cache,
        )
        reference = plain_generator(plain, [ids], [VIDEOS[:1]], used, [len(PROMPTS[0])], images=[IMAGES[1:]])
        assert torch.equal(second[:, -NEW:], expected(reference, inputs_of([ids]), **options)[:, -NEW:])
        third = torch.cat([ids, second[0, -NEW:], make_prompt(3, seed=37)])
        if num_beams == 1:  # the record goes on behind the image, too
            answer = model.generate(input_ids=third[None], **GREEDY, cache=cache)
            reference = plain_generator(plain, [third], [VIDEOS[:1]], used, [len(PROMPTS[0])], images=[IMAGES[1:]])
            assert torch.equal(answer[:, -NEW:], expected(reference, inputs_of([third]), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("settings", ["on", "off"])
    def test_two_conversations_in_turns_do_not_disturb_each_other(self, model, upstream, used, settings):
        """Upstream keeps `rope_deltas` on the model: there, the first conversation's second turn is another's."""
        settings = used if settings == "on" else OFF
        questions = [make_prompt(4, seed=41), make_prompt(5, seed=42)]

        def turn(row, cache, past=None):
            if past is None:
                inputs = inputs_of([PROMPTS[row]], [VIDEOS[row]])
            else:
                inputs = inputs_of([torch.cat([past[0], questions[row]])])
            return model.generate(**inputs, **GREEDY, cache=cache, holitom_config=settings)

        alone = []
        for row in range(2):
            cache = DynamicCache()
            alone.append(turn(row, cache, turn(row, cache)))
        caches = [DynamicCache(), DynamicCache()]
        firsts = [turn(row, caches[row]) for row in range(2)]
        model.generate(**inputs_of(PROMPTS, VIDEOS), **GREEDY)  # a batch of two in between
        assert all(torch.equal(turn(row, caches[row], firsts[row]), alone[row]) for row in range(2))
        assert model.model.rope_deltas is None
        if settings is OFF:
            cache = DynamicCache()
            first = upstream.generate(**inputs_of(PROMPTS[:1], VIDEOS[:1]), **GREEDY, **{CACHE_NAME: cache})
            second = inputs_of([torch.cat([first[0], questions[0]])])
            assert torch.equal(upstream.generate(**second, **GREEDY, **{CACHE_NAME: cache}), alone[0])

    def test_a_copied_and_repeated_cache(self, model, plain, used):
        prefix = make_prompt(3, GRIDS[0], 2, seed=35)
        cache = DynamicCache()
        with torch.no_grad():
            model(**inputs_of([prefix], VIDEOS[:1]), cache=cache, use_cache=True)
        prompts = [torch.cat([prefix, make_prompt(6, seed=seed)]) for seed in (36, 37)]
        reference = plain_generator(plain, prompts, [VIDEOS[:1]] * 2, used, [len(prefix)] * 2)
        wanted = expected(reference, inputs_of(prompts), **GREEDY)
        for row in range(2):
            found = model.generate(**inputs_of(prompts[row : row + 1]), **GREEDY, cache=copy.deepcopy(cache))
            assert torch.equal(found[0], wanted[row])
        cache.batch_repeat_interleave(2)
        assert torch.equal(model.generate(**inputs_of(prompts), **GREEDY, cache=cache), wanted)


def off_then_on(plain, prompts, videos, settings, lengths):
    """[`plain_generator`] whose first video in every row was not compressed."""
    generator = plain_generator(plain, prompts, videos, settings, lengths)
    for row in range(len(prompts)):
        generator.encoded[row][0] = plain.encode(*videos[row][0], OFF)
    return generator


class TestPositions:
    @torch.no_grad()
    def test_tokens_keep_their_coordinates(self, model, upstream, used, single):
        """What goes into the decoder is upstream's `get_rope_index` where tokens are left."""
        seen = {}

        def look(module, args, kwargs):
            seen.update(kwargs)

        handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        merged = model(**single).merged_videos[0][0]
        handle.remove()
        positions, _ = upstream.model.get_rope_index(**{n: v for n, v in single.items() if "pixel" not in n})
        is_video = single["mm_token_type_ids"][0] == 2
        left = ~is_video
        left[is_video.nonzero()[:, 0][merged.place]] = True
        assert torch.equal(seen["position_ids"], positions[:, :, left])
        segments = dict.fromkeys(start for start, _ in merged.segments)
        static = merged.frame[merged.kind == TokenKind.STATIC]
        assert len(static)
        assert set(static.tolist()) <= set(segments)

    @torch.no_grad()
    def test_packed_and_kept_are_the_same(self, model, single):
        ours = [model(**single, holitom_config={"position_ids": kind}).logits for kind in ("packed", "kept")]
        assert torch.equal(*ours)

    @torch.no_grad()
    def test_positions_of_the_caller(self, model, upstream, used, batch):
        inputs = {n: v for n, v in batch.items() if "pixel" not in n}
        positions, _ = upstream.model.get_rope_index(**inputs)
        wanted = model(**batch).logits
        without = {n: v for n, v in batch.items() if n != "mm_token_type_ids"}
        for given in (positions, torch.cat([positions[:1], positions])):
            assert torch.equal(model(**without, position_ids=given).logits, wanted)


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_loss_and_gradients_are_the_plain_loops(self, model, plain, used, single, checkpointing):
        ids = single["input_ids"]
        labels = ids.masked_fill(single["mm_token_type_ids"] > 0, -100)
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = trained(**single, labels=labels, use_cache=False).loss
        loss.backward()
        encoded = [PlainQwen.encode.__wrapped__(plain, *VIDEOS[0], used)]
        logits = PlainQwen.logits.__wrapped__(plain, ids[0], encoded, used, None, VIDEOS[:1])
        wanted = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
        for name in (
            "model.language_model.layers.0.self_attn.q_norm.weight",
            "model.visual.deepstack_merger_list.1.linear_fc2.weight",
            "model.visual.blocks.0.attn.qkv.weight",
        ):
            theirs = torch.autograd.grad(wanted, plain.upstream.get_parameter(name), retain_graph=True)[0]
            torch.testing.assert_close(trained.get_parameter(name).grad, theirs, atol=1e-5, rtol=1e-3)


class TestCompile:
    @pytest.mark.parametrize("which", ["batch", "single"])
    def test_the_decoding_step_compiles_without_a_graph_break(self, model, reference, request, which):
        inputs = request.getfixturevalue(which)
        config = CompileConfig(fullgraph=True, backend="eager")
        config._compile_all_devices = True
        torch._dynamo.reset()  # of what other tests compiled of the same code
        compiled = type(model)(copy.deepcopy(model.config)).eval()
        compiled.load_state_dict(model.state_dict())
        outputs = compiled.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        assert torch.equal(outputs, expected(reference, inputs, **GREEDY))
