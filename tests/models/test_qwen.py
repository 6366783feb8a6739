"""The Qwen-VL families: off they are upstream's classes to the bit, on the plain loop over upstream's parts."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from holitom_hf import HoliTomConfig
from holitom_hf.benchmarking.architectures import qwen_architecture
from holitom_hf.merging.merged_video import TokenKind
from holitom_hf.models.registry import backbone_class, backbones
from holitom_hf.models.upstream import CACHE_NAME, cache_of

from .qwen import (
    FAMILIES,
    IMAGE,
    MERGE,
    ON,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    PlainQwen,
    make_patches,
    media,
    plain_generator,
    token_types,
    video,
)


OFF = HoliTomConfig(retention_ratio=1.0, inner_merge_layer=None)
NEW = 4
# Models with random weights also emit placeholders, for which no oracle has an image.
TEXT_ONLY = {"max_new_tokens": NEW, "suppress_tokens": [VISION_START, VISION_END, IMAGE, VIDEO]}
GREEDY = {"do_sample": False} | TEXT_ONLY
USED = ("all stages", "stage 3 early", "no stage 3", "kept and sized")
# Of the variants with experts and Qwen3.5, what their parts do not share with the others.
USED_BY = {
    "qwen3_vl_moe": ("all stages",),
    "qwen3_5": ("all stages", "no stage 3", "kept and sized"),
    "qwen3_5_moe": ("all stages",),
}


# What differs between these is tested with another family, too.
SLOW = {("qwen2_5_vl", "stage 3 early"), ("qwen2_5_vl", "no stage 3"), ("qwen3_5", "no stage 3")}


def pytest_generate_tests(metafunc):
    """Family by family, and in each settings by settings; what is compiled takes long, and once is usually enough."""
    if "used" in metafunc.fixturenames:
        pairs = [(family, used) for family in FAMILIES for used in USED_BY.get(family, USED)]
        slow = {pair for pair in pairs if metafunc.cls is TestCompile and pair[1] != "all stages"} | SLOW
        pairs = [pytest.param(*pair, marks=pytest.mark.slow if pair in slow else ()) for pair in pairs]
        metafunc.parametrize(("family", "used"), pairs, indirect=True, scope="module")
    elif "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family):
    torch.manual_seed(0)
    return family.generation(family.ours("Config")(**family.values, holitom_config=ON)).eval()


@pytest.fixture(scope="module")
def upstream(family, model):
    upstream = family.upstream(family.upstream.config_class(**family.values)).eval()
    upstream.load_state_dict(model.state_dict())
    return upstream


@pytest.fixture(scope="module")
def plain(family, model) -> PlainQwen:
    return family.plain(model, family.upstream, family.upstream.config_class(**family.values))


@pytest.fixture(scope="module")
def used(request, family, model):
    usual, early, late = family.layers
    changes = {
        "all stages": {"inner_merge_layer": usual},
        "stage 3 early": {"inner_merge_layer": early},
        "no stage 3": {"inner_merge_layer": None},
        "kept and sized": {"position_ids": "kept", "proportional_attention": True, "inner_merge_layer": late},
    }[request.param]
    model.config.holitom_config = replace(ON, **changes)
    yield model.config.holitom_config
    model.config.holitom_config = ON


@pytest.fixture(scope="module")
def prompts(family) -> list[torch.Tensor]:
    return family.prompts()


@pytest.fixture(scope="module")
def videos(family) -> list:
    return family.videos()


@pytest.fixture
def batch(family, prompts, videos) -> dict:
    return family.inputs_of(prompts, videos)


@pytest.fixture
def single(family, prompts, videos) -> dict:
    return family.inputs_of(prompts[:1], videos[:1])


@pytest.fixture(scope="module")
def reference(plain, used, prompts, videos):
    return plain_generator(plain, prompts, [[video] for video in videos], used)


def text_only(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


def expected(reference, inputs: dict, **kwargs):
    """What the plain loop says; once for the tests that ask it the same."""
    key = repr(kwargs), *(value.numpy().tobytes() for value in text_only(inputs).values())
    if key not in (said := vars(reference).setdefault("said", {})):
        torch.manual_seed(5)
        said[key] = reference.generate(**text_only(inputs), **kwargs, use_cache=False)
    return said[key]


def cache_for(model, kind: str = "dynamic"):
    if kind == "static":
        return StaticCache(model.config, max_cache_len=200)
    return DynamicCache(config=model.config)


IMAGES = [video((1, 4, 4), 31), video((1, 4, 8), 32)]
CASES = {
    "text": lambda f: f.inputs_of([f.prompt(9), f.prompt(5)]),
    "images": lambda f: f.inputs_of([f.prompt(2, (4, 4), 3), f.prompt((4, 8), 9)], images=IMAGES),
    "a video": lambda f: f.inputs_of(f.prompts()[:1], f.videos()[:1]),
    "videos of two grids": lambda f: f.inputs_of(f.prompts(), f.videos()),
    "right padding": lambda f: f.inputs_of(f.prompts(), f.videos(), side="right"),
    "images and videos": lambda f: f.inputs_of(
        [f.prompt(2, (4, 4), 1, f.grids[0], 3), f.prompt(f.grids[1], 2, (4, 8), 2)], f.videos(), IMAGES
    ),
}


class TestOff:
    @pytest.mark.parametrize("case", CASES)
    @torch.no_grad()
    def test_logits_are_upstreams_to_the_bit(self, family, model, upstream, case):
        inputs = CASES[case](family)
        ours, theirs = model(**inputs, holitom_config=OFF), upstream(**inputs)
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.merged_videos is None

    @pytest.mark.parametrize("case", [case for case in CASES if case != "right padding"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
    def test_generate_is_upstreams(self, family, model, upstream, case, options):
        options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True} | options
        wanted = {"output_logits": True} | options
        torch.manual_seed(1)
        ours = model.generate(**CASES[case](family), holitom_config=OFF, **wanted)
        torch.manual_seed(1)
        theirs = upstream.generate(**CASES[case](family), **wanted)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))

    @pytest.mark.parametrize("case", CASES)
    def test_loss_and_gradients_are_upstreams(self, family, model, upstream, case):
        inputs = CASES[case](family)
        labels = inputs["input_ids"].clone()
        labels[:, :3] = -100
        asked = {"labels": labels, "use_cache": False} | ({"output_router_logits": True} if family.has_experts else {})
        ours = model(**inputs, **asked, holitom_config=OFF).loss
        theirs = upstream(**inputs, **asked).loss
        assert torch.equal(ours, theirs)
        name = "model.visual.blocks.0.attn.qkv.weight" if "video" in case else "lm_head.weight"
        gradients = [
            torch.autograd.grad(loss, m.get_parameter(name))[0] for loss, m in ((ours, model), (theirs, upstream))
        ]
        assert torch.equal(*gradients)


class TestEncoding:
    """What travels with the features."""

    @torch.no_grad()
    def test_features_importance_and_maps(self, family, model, upstream, plain, videos):
        inputs = media(videos)
        ours, theirs = model.get_video_features(**inputs), upstream.get_video_features(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours.pooler_output, theirs.pooler_output, strict=True))
        assert (ours.deepstack_features is not None) == family.has_deepstack
        for a, b in zip(ours.deepstack_features or (), getattr(theirs, "deepstack_features", ()), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for found, each in zip(ours.importance, videos, strict=True):
            torch.testing.assert_close(found, plain.importance(*each), atol=1e-7, rtol=1e-5)
        assert [tuple(keys.shape) for keys in ours.attention_keys] == [(t, h * w // 4, 16) for t, h, w in family.grids]
        assert ours.grids == list(family.grids)

    @pytest.mark.parametrize("at_once", [1, 2, 3, 100])
    @torch.no_grad()
    def test_chunks_of_temporal_patches_change_nothing(self, model, videos, at_once):
        inputs = media([*videos, video((1, 4, 4), 25)])
        whole = model.get_video_features(**inputs, output_hidden_states=True)
        parts = model.get_video_features(**inputs, output_hidden_states=True, vision_batch_size=at_once)
        for name in ("pooler_output", "importance", "attention_keys", "hidden_states"):
            for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        for a, b in zip(whole.deepstack_features or (), parts.deepstack_features or (), strict=True):
            torch.testing.assert_close(torch.cat(a), torch.cat(b), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.last_hidden_state, parts.last_hidden_state, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_hidden_states_are_those_asked_for(self, model, upstream, videos):
        inputs = media(videos)
        assert model.get_video_features(**inputs).hidden_states is None
        ours = model.get_video_features(**inputs, output_hidden_states=True).hidden_states
        theirs = upstream.get_video_features(**inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @torch.no_grad()
    def test_encoded_before(self, model, used, batch, videos):
        inputs = media(videos)
        encoded = {"video": model.get_video_features(**inputs)}
        given = {n: v for n, v in batch.items() if n not in inputs} | {"mm_encoder_outputs": encoded}
        assert torch.equal(model(**copy.deepcopy(given)).logits, model(**batch).logits)
        assert torch.equal(model.generate(**given, **GREEDY), model.generate(**batch, **GREEDY))

    def test_what_does_not_fit_is_said(self, family, model, upstream, prompts, videos, single):
        title = backbones()[model.config.model_type].title
        depth = model.config.vision_config.depth
        with pytest.raises(ValueError, match=f"vision tower of {title} has {depth} layers: choose 1 to {depth - 1}"):
            model(**single, holitom_config={"vision_reuse_layer": depth})
        with pytest.raises(ValueError, match="without mm_token_type_ids"):
            model(**{name: value for name, value in single.items() if name != "mm_token_type_ids"})
        with pytest.raises(ValueError, match="without mm_token_type_ids"):
            model.generate(**{name: value for name, value in single.items() if name != "mm_token_type_ids"})
        with pytest.raises(ValueError, match=rf"shape \(1, 5\), for {len(prompts[0])} new tokens"):
            model(**single | {"mm_token_type_ids": torch.zeros(1, 5, dtype=torch.int)})
        with pytest.raises(ValueError, match=r"must have shape \(videos, 3\), got None"):
            model(**{name: value for name, value in single.items() if name != "video_grid_thw"})
        with pytest.raises(ValueError, match="is that of 96 flat patches"):
            model(**single | {"video_grid_thw": torch.tensor([[3, 4, 8]])})
        with pytest.raises(ValueError, match="both sides must be multiples of 2"):
            model(**single | {"video_grid_thw": torch.tensor([[4, 1, 32]])})
        count = int((prompts[0] == VIDEO).sum())
        message = f"row 0 of the prompt has {count} video placeholders, but its videos need 24"
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**single | family.media([video((3, 4, 8), 1)]))
        with pytest.raises(ValueError, match="more images or videos than grids"):
            model(**family.inputs_of([family.prompt((4, 4), family.grids[0], (4, 4))], videos[:1], IMAGES[:1]))
        with pytest.raises(ValueError, match="vision_batch_size must be at least 1"):
            model(**single, vision_batch_size=0)
        broken = single["pixel_values_videos"].clone()
        broken[70, 3] = torch.nan
        _, height, width = family.grids[0]
        with pytest.raises(ValueError, match=f"video 0 has NaN or infinite pixels in frame {70 // (height * width)}"):
            model(**single | {"pixel_values_videos": broken})
        grids = {"video_grid_thw": single["video_grid_thw"]}
        encoded = upstream.get_video_features(single["pixel_values_videos"], **grids)
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
    def test_logits_of_every_position(self, family, model, plain, used, prompts, videos, side):
        inputs = family.inputs_of(prompts, videos, side=side)
        outputs = model(**inputs)
        for row, prompt in enumerate(prompts):
            wanted = plain.logits(prompt, [plain.encode(*videos[row], used)], used, videos=[videos[row]])
            found = outputs.logits[row, inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(found, wanted, atol=family.tolerance, rtol=1e-4)
        merged = outputs.merged_videos[0][0]
        assert merged.num_tokens < 0.6 * merged.num_input_tokens
        assert (merged.place.diff() > 0).all()

    @torch.no_grad()
    def test_right_padding_goes_on_behind_each_row(self, family, model, reference, prompts, videos):
        """Upstream's own count goes on from the padding."""
        outputs = model(**family.inputs_of(prompts, videos, side="right"), use_cache=True)
        record = cache_of(outputs).compressed_sequence
        alone = []
        for row, prompt in enumerate(prompts):
            lone = model(**family.inputs_of([prompt], [videos[row]]), use_cache=True)
            alone.append(cache_of(lone).compressed_sequence.next_position[0])
        assert record.next_position.tolist() == torch.stack(alone).tolist()

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementations(self, model, reference, batch, implementation):
        other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=implementation).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.generate(**batch, **GREEDY), expected(reference, batch, **GREEDY))

    @pytest.mark.parametrize("kind", ["prompt lookup", "the model itself", "upstream's class"])
    def test_assisted_decoding(self, family, model, upstream, reference, single, kind):
        options = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "the model itself": {"assistant_model": model},
            "upstream's class": {"assistant_model": upstream},
        }[kind]
        if family.is_hybrid:
            with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
                model.generate(**single, **options, **GREEDY)
            return
        outputs = model.generate(**single, **options, **GREEDY)
        assert torch.equal(outputs, expected(reference, single, **GREEDY))

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_images_beside_videos_and_several_videos(self, family, model, plain, used, videos, num_beams):
        first, second = family.grids
        prompts = [family.prompt(2, (4, 4), 1, first, 3, second, 2), family.prompt(1, second, 4, (4, 8), 2)]
        videos = [[*videos], [video(second, 40)]]
        images = [IMAGES[:1], IMAGES[1:]]
        inputs = family.inputs_of(prompts, [v for row in videos for v in row], IMAGES)
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
    def test_step_by_step_without_position_ids(self, family, model, plain, used, prompts, videos):
        ids = torch.cat([prompts[0], family.prompt(6, seed=50)])
        cache, length = cache_for(model), len(prompts[0])
        model(**family.inputs_of(prompts[:1], videos[:1]), cache=cache)
        found = torch.cat(
            [model(input_ids=part[None], cache=cache).logits for part in ids[length:].split([1, 3, 2])], 1
        )
        wanted = plain.logits(ids, [plain.encode(*videos[0], used)], used, length, videos[:1])
        torch.testing.assert_close(found[0], wanted[length:], atol=family.tolerance, rtol=1e-4)


def pad_turns(family: Family, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = family.inputs_of(rows)
    return inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))


PADDED_TURN = "rows of a later turn would be padded behind what is cached"


class TestTurns:
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("lengths", [(4, 4), (7, 3)])
    def test_a_second_question_with_padding_inside(
        self, family, model, plain, used, prompts, videos, batch, kind, lengths
    ):
        cache = cache_for(model, kind)
        first = model.generate(**batch, **GREEDY, cache=cache)
        question, is_real = pad_turns(family, [family.prompt(n, seed=31 + n) for n in lengths])
        ids = torch.cat([first, question], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long), is_real], 1)
        if family.is_hybrid and not is_real.all():
            with pytest.raises(ValueError, match=PADDED_TURN):
                model.generate(input_ids=ids, attention_mask=mask, **GREEDY, cache=cache)
            return
        second = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, cache=cache)
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        reference = plain_generator(
            plain, whole, [[v] for v in videos], used, prompt_lengths=[len(prompt) for prompt in prompts]
        )
        assert torch.equal(second[:, -NEW:], expected(reference, family.inputs_of(whole), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("first_settings", ["on", "off"])
    def test_a_second_video(self, family, model, plain, used, prompts, videos, kind, first_settings):
        """The first turn may have been compressed or not: upstream crashes here."""
        before = used if first_settings == "on" else OFF
        if first_settings == "off" and used.inner_merge_layer:
            used = replace(used, inner_merge_layer=None)
        more = [[video((3, 4, 4), 33)], [video((2, 4, 8), 34), video((2, 4, 4), 35)]]
        turns = [family.prompt(2, (3, 4, 4), 5, seed=34), family.prompt((2, 4, 8), (2, 4, 4), 3, seed=35)]

        def both_turns(rows):
            cache = cache_for(model, kind)
            batch = family.inputs_of([prompts[row] for row in rows], [videos[row] for row in rows])
            first = model.generate(**batch, **GREEDY, cache=cache, holitom_config=before)
            turn, is_real = pad_turns(family, [turns[row] for row in rows])
            ids = torch.cat([first, turn], 1)
            seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            mask = torch.cat([seen, torch.ones(len(rows), NEW, dtype=torch.long), is_real], 1)
            inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": token_types(ids)}
            new = family.media([v for row in rows for v in more[row]])
            second = model.generate(**inputs, **new, **GREEDY, cache=cache, holitom_config=used)
            return second, [row[keep.bool()] for row, keep in zip(ids, mask)]

        if family.is_hybrid:
            with pytest.raises(ValueError, match=PADDED_TURN):
                both_turns([0, 1])
        for rows in ([0], [1]) if family.is_hybrid else ([0, 1],):
            second, whole = both_turns(rows)
            shown = [[videos[row], *more[row]] for row in rows]
            lengths = [[len(prompts[row]), *[len(ids)] * len(more[row])] for row, ids in zip(rows, whole)]
            reference = (plain_generator if first_settings == "on" else off_then_on)(
                plain, whole, shown, used, lengths
            )
            assert torch.equal(second[:, -NEW:], expected(reference, family.inputs_of(whole), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("num_beams", [1, 2])
    @pytest.mark.parametrize("given", ["all ids", "new ids"])
    def test_a_second_turn_with_an_image(self, family, model, plain, used, prompts, videos, single, num_beams, given):
        if family.is_hybrid and num_beams > 1:
            pytest.skip("upstream's caches of states can't be repeated")
        cache = cache_for(model)
        first = model.generate(**single, **GREEDY, cache=cache)
        if num_beams > 1:
            cache.batch_repeat_interleave(num_beams)
        turn = family.prompt(2, (4, 8), 4, seed=36)
        ids = torch.cat([first[0], turn])
        mask = torch.ones(1, len(ids), dtype=torch.long)
        passed = ids if given == "all ids" else ids[first.shape[1] - 1 :]
        options = GREEDY | {"num_beams": num_beams}
        second = model.generate(
            input_ids=passed[None],
            attention_mask=mask,
            mm_token_type_ids=token_types(passed)[None],
            **family.media(images=IMAGES[1:]),
            **options,
            cache=cache,
        )
        reference = plain_generator(plain, [ids], [videos[:1]], used, [len(prompts[0])], images=[IMAGES[1:]])
        assert torch.equal(second[:, -NEW:], expected(reference, family.inputs_of([ids]), **options)[:, -NEW:])
        third = torch.cat([ids, second[0, -NEW:], family.prompt(3, seed=37)])
        if num_beams == 1:  # the record goes on behind the image, too
            answer = model.generate(input_ids=third[None], **GREEDY, cache=cache)
            reference = plain_generator(plain, [third], [videos[:1]], used, [len(prompts[0])], images=[IMAGES[1:]])
            assert torch.equal(answer[:, -NEW:], expected(reference, family.inputs_of([third]), **GREEDY)[:, -NEW:])

    @pytest.mark.parametrize("settings", ["on", "off"])
    def test_two_conversations_in_turns_do_not_disturb_each_other(
        self, family, model, upstream, used, prompts, videos, settings
    ):
        """Upstream keeps `rope_deltas` on the model: there, the first conversation's second turn is another's."""
        settings = used if settings == "on" else OFF
        questions = [family.prompt(4, seed=41), family.prompt(5, seed=42)]

        def turn(row, cache, past=None):
            if past is None:
                inputs = family.inputs_of([prompts[row]], [videos[row]])
            else:
                inputs = family.inputs_of([torch.cat([past[0], questions[row]])])
            return model.generate(**inputs, **GREEDY, cache=cache, holitom_config=settings)

        alone = []
        for row in range(2):
            cache = cache_for(model)
            alone.append(turn(row, cache, turn(row, cache)))
        caches = [cache_for(model), cache_for(model)]
        firsts = [turn(row, caches[row]) for row in range(2)]
        model.generate(**family.inputs_of(prompts, videos), **GREEDY)  # a batch of two in between
        assert all(torch.equal(turn(row, caches[row], firsts[row]), alone[row]) for row in range(2))
        assert model.model.rope_deltas is None
        if settings is OFF and family.is_timed:
            cache = cache_for(model)
            first = upstream.generate(**family.inputs_of(prompts[:1], videos[:1]), **GREEDY, **{CACHE_NAME: cache})
            second = family.inputs_of([torch.cat([first[0], questions[0]])])
            assert torch.equal(upstream.generate(**second, **GREEDY, **{CACHE_NAME: cache}), alone[0])
        elif settings is OFF:
            # Upstream over the whole: Qwen2.5-VL's cached second turn goes on behind the time axis instead.
            whole = family.inputs_of([alone[0][0, :-NEW]], videos[:1])
            assert torch.equal(upstream.generate(**whole, **GREEDY), alone[0])

    def test_a_copied_and_repeated_cache(self, family, model, plain, used, videos):
        prefix = family.prompt(3, family.grids[0], 2, seed=35)
        cache = cache_for(model)
        with torch.no_grad():
            model(**family.inputs_of([prefix], videos[:1]), cache=cache, use_cache=True)
        prompts = [torch.cat([prefix, family.prompt(6, seed=seed)]) for seed in (36, 37)]
        reference = plain_generator(plain, prompts, [videos[:1]] * 2, used, [len(prefix)] * 2)
        wanted = expected(reference, family.inputs_of(prompts), **GREEDY)
        for row in range(2):
            found = model.generate(**family.inputs_of(prompts[row : row + 1]), **GREEDY, cache=copy.deepcopy(cache))
            assert torch.equal(found[0], wanted[row])
        if not family.is_hybrid:
            cache.batch_repeat_interleave(2)
            assert torch.equal(model.generate(**family.inputs_of(prompts), **GREEDY, cache=cache), wanted)


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
    def test_loss_and_gradients_are_the_plain_loops(self, family, model, plain, used, videos, single, checkpointing):
        ids = single["input_ids"]
        labels = ids.masked_fill(single["mm_token_type_ids"] > 0, -100)
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = trained(**single, labels=labels, use_cache=False).loss
        loss.backward()
        encoded = [plain.encode_anew(*videos[0], used)]
        logits = PlainQwen.logits.__wrapped__(plain, ids[0], encoded, used, None, videos[:1])
        wanted = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(loss, wanted, atol=family.tolerance, rtol=1e-5)
        for name in family.trained:
            theirs = torch.autograd.grad(wanted, plain.upstream.get_parameter(name), retain_graph=True)[0]
            torch.testing.assert_close(trained.get_parameter(name).grad, theirs, atol=family.tolerance, rtol=1e-3)


class TestCompile:
    @pytest.mark.parametrize("which", ["batch", pytest.param("single", marks=pytest.mark.slow)])
    def test_the_decoding_step_compiles_without_a_graph_break(self, model, reference, request, which):
        inputs = request.getfixturevalue(which)
        config = CompileConfig(fullgraph=True, backend="eager")
        config._compile_all_devices = True
        torch._dynamo.reset()  # of what other tests compiled of the same code
        compiled = type(model)(copy.deepcopy(model.config)).eval()
        compiled.load_state_dict(model.state_dict())
        outputs = compiled.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        assert torch.equal(outputs, expected(reference, inputs, **GREEDY))


class TestQwen25VL:
    @pytest.fixture(scope="class")
    def lone(self):
        return FAMILIES["qwen2_5_vl"]

    @torch.no_grad()
    def test_importance_needs_a_last_block_that_sees_the_frame(self, lone):
        sizes = copy.deepcopy(lone.values)
        sizes["vision_config"]["fullatt_block_indexes"] = [0, 2]
        windowed = lone.generation(lone.ours("Config")(**sizes, holitom_config=ON))
        single = CASES["a video"](lone)
        with pytest.raises(ValueError, match=r"last block \(3\) attends within windows \(.*\[0, 2\]\)"):
            windowed(**single)
        windowed(**single, holitom_config=OFF)
        windowed(**single, holitom_config={"outer_method": "farthest_points"})

    @torch.no_grad()
    def test_a_long_videos_times_are_apart_whatever_seconds_were_cast_to(self, lone):
        with torch.device("meta"):
            model = lone.ours("Model")(lone.ours("Config")(**lone.values, holitom_config=ON))
        positions = model.full_positions(
            torch.zeros(1, 1, dtype=torch.long),
            torch.ones(1, 400, dtype=torch.bool),
            mm_token_type_ids=torch.full((1, 400), 2),
            video_grid_thw=torch.tensor([[400, 2, 2]]),
            second_per_grid_ts=torch.tensor([0.75], dtype=torch.bfloat16),
        )
        assert positions[0, 0].tolist() == [int(2 * 0.75 * patch) for patch in range(400)]

    def test_seconds_of_every_video_are_needed(self, lone):
        model = lone.generation(lone.ours("Config")(**lone.values, holitom_config=ON))
        two = lone.inputs_of([lone.prompt(lone.grids[0], 1, lone.grids[1])], lone.videos())
        with pytest.raises(ValueError, match="video_grid_thw and second_per_grid_ts of everything"):
            model(**two | {"second_per_grid_ts": torch.tensor([1.0])})


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.is_hybrid])
def hybrid(request) -> Family:
    return FAMILIES[request.param]


class TestStage3BehindFullAttention:
    def test_other_layers_are_refused_when_a_model_is_made(self, hybrid):
        """Layers 1 and 3 of 0 to 4 have full attention."""
        config = hybrid.ours("Config")(**hybrid.values, holitom_config=replace(ON, inner_merge_layer=3))
        with pytest.raises(ValueError, match=r"inner_merge_layer is 3, but .* choose one of 2, 4, or None"):
            hybrid.generation(config)
        config.holitom_config = {"inner_merge_layer": 5}
        with pytest.raises(ValueError, match="the decoder has 5 layers: choose 1 to 4"):
            hybrid.generation(config)
        config.holitom_config = {"inner_method": "none"}
        hybrid.generation(config)

    @torch.no_grad()
    def test_of_a_call_they_are_refused_before_the_tower_runs(self, hybrid, monkeypatch):
        model = hybrid.generation(hybrid.ours("Config")(**hybrid.values, holitom_config=ON)).eval()
        monkeypatch.setattr(type(model.model.visual), "forward", None)
        with pytest.raises(ValueError, match="choose one of 2, 4, or None"):
            model(**CASES["a video"](hybrid), holitom_config={"inner_merge_layer": 1})

    def test_by_default_every_fourth_layer_can_be_followed_but_the_last(self):
        config = qwen_architecture("qwen3.5-9b")
        assert config.holitom_config.inner_merge_layer == 20
        with torch.device("meta"):
            decoder = backbone_class(config.backbone, "model")(config).language_model
        decoder.check_layers(28)
        with pytest.raises(ValueError, match="choose one of 4, 8, 12, 16, 20, 24, 28, or None"):
            decoder.check_layers(18)


@pytest.mark.parametrize(
    ("settings", "choice"),
    [
        ({"vision_method": "tome", "vision_reuse_layer": 1}, "'reuse'"),
        ({"vision_method": "frames"}, "'reuse'"),
        ({"newline_position": "row"}, "'end'"),
    ],
)
class TestSettingsOfOtherModels:
    """They are refused as soon as a model's configuration has them, not by its first call."""

    def refused(self, family: Family, settings: dict, choice: str):
        [(name, value), *_] = settings.items()
        title = family.ours("Config").backbone.title
        return pytest.raises(ValueError, match=f"^{name} '{value}' is for LLaVA alone: with {title} choose {choice}$")

    def test_when_they_are_assigned(self, family, settings, choice):
        with self.refused(family, settings, choice):
            family.ours("Config")(**family.values, holitom_config=settings)
        config = family.ours("Config")(**family.values, holitom_config=ON)
        with self.refused(family, settings, choice):
            config.holitom_config = settings
        with self.refused(family, settings, choice):
            config.holitom_config = replace(ON, **settings)
        assert config.holitom_config == ON

    def test_when_a_model_is_loaded(self, family, settings, choice, tmp_path):
        family.ours("Config")(**family.values, holitom_config=ON).save_pretrained(tmp_path)
        with self.refused(family, settings, choice):
            family.generation.from_pretrained(tmp_path, holitom_config=settings)
        saved = json.loads((tmp_path / "config.json").read_text())
        saved["holitom_config"] |= settings
        (tmp_path / "config.json").write_text(json.dumps(saved))
        with self.refused(family, settings, choice):
            family.generation.from_pretrained(tmp_path)

    @torch.no_grad()
    def test_of_a_call_before_the_tower_runs(self, family, settings, choice, monkeypatch):
        model = family.generation(family.ours("Config")(**family.values, holitom_config=ON)).eval()
        monkeypatch.setattr(type(model.model.visual), "forward", None)
        with self.refused(family, settings, choice):
            model(**CASES["a video"](family), holitom_config=settings)


@torch.no_grad()
def test_of_a_video_of_one_token_that_token_stays_behind_stage_3(family):
    torch.manual_seed(0)
    model = family.generation(family.ours("Config")(**family.values, holitom_config=ON)).eval()
    grid = (1, MERGE, MERGE)
    inputs = family.inputs_of([family.prompt(3, grid, 4)], [(grid, make_patches(grid, 1))])
    settings = replace(ON, retention_ratio=1.0)
    found = model(**inputs, holitom_config=settings)
    assert [keep.tolist() for keep in found.inner_keep] == [list(range(inputs["input_ids"].shape[1]))]
    whole = model(**inputs, holitom_config=replace(settings, inner_method="none"))
    torch.testing.assert_close(found.logits, whole.logits, atol=family.tolerance, rtol=1e-4)


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.has_experts])
def with_experts(request) -> Family:
    return FAMILIES[request.param]


class TestExperts:
    def make(self, family: Family):
        torch.manual_seed(0)
        return family.generation(family.ours("Config")(**family.values, holitom_config=ON)).eval()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("layer", [2, None])
    @torch.no_grad()
    def test_router_logits_are_those_of_the_tokens_that_a_layer_sees(self, with_experts, side, layer):
        """Row by row, of every token that is left, and none of the padding."""
        model, prompts, videos = self.make(with_experts), with_experts.prompts(), with_experts.videos()
        asked = {"output_router_logits": True, "holitom_config": replace(ON, inner_merge_layer=layer)}
        both = model(**with_experts.inputs_of(prompts, videos, side=side), **asked)
        alone = [model(**with_experts.inputs_of([p], [v]), **asked) for p, v in zip(prompts, videos)]
        dense = with_experts.values["text_config"].get("mlp_only_layers", ())
        layers = [index for index in range(5) if index not in dense]
        for number, index in enumerate(layers):
            rows = [outputs.router_logits[number] for outputs in alone]
            records = [cache_of(outputs).compressed_sequence for outputs in alone]
            for of_row, record in zip(rows, records):
                seen = record.inner_mask if layer is not None and index >= layer else record.outer_mask
                assert len(of_row) == seen.sum()
            found = both.router_logits[number]
            torch.testing.assert_close(found, torch.cat(rows), atol=with_experts.tolerance, rtol=1e-4)

    @torch.no_grad()
    def test_the_loss_of_load_balancing_is_over_these(self, with_experts):
        model = self.make(with_experts)
        inputs = with_experts.inputs_of(with_experts.prompts(), with_experts.videos())
        labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
        with_loss = model(**inputs, labels=labels, output_router_logits=True)
        plain = model(**inputs, labels=labels)
        assert plain.aux_loss is None
        probabilities = torch.cat(with_loss.router_logits).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2, dim=-1).indices, 1.0)
        wanted = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
        torch.testing.assert_close(with_loss.aux_loss, wanted)
        coefficient = model.config.text_config.router_aux_loss_coef
        torch.testing.assert_close(with_loss.loss, plain.loss + coefficient * wanted)

    @torch.no_grad()
    def test_a_later_turn_has_router_logits_too(self, with_experts):
        model = self.make(with_experts)
        first = model(**with_experts.inputs_of(with_experts.prompts(), with_experts.videos()), use_cache=True)
        cache, question = cache_of(first), torch.stack([with_experts.prompt(4, seed=seed) for seed in (1, 2)])
        second = model(input_ids=question, cache=cache, output_router_logits=True)
        assert {len(logits) for logits in second.router_logits} == {8}
        assert torch.isfinite(second.aux_loss)
