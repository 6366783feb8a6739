"""
Every way people generate, with all three stages on, against upstream's `generate` over the plain loop.

The plain loop has no cache, no batch and no packing; see tests/reference.py.
"""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    StaticCache,
    TextStreamer,
)
from transformers.generation.configuration_utils import CompileConfig

from holitom_hf.bundled.tiny_model import tiny_tokenizer
from holitom_hf.models.upstream import cache_of

from ..conftest import SMALL, make_prompt, make_video, pad_batch
from ..reference import PlainGenerator, PlainModel
from . import llava_video


NEW = 6


class OneVision:
    """
    What is asked of LLaVA-OneVision, and how prompts and videos for it are made.

    Attributes:
        settings: The models' in every test.
        prompts, videos: A batch.
    """

    prompt, video, seeds = staticmethod(make_prompt), staticmethod(make_video), (21, 22)

    def __init__(self, model, plain, settings):
        self.model, self.plain, self.settings = model, plain, settings
        first, second = self.seeds
        self.prompts = [self.prompt(3, "video:5", 8, seed=first), self.prompt(2, "video:5", 3, seed=second)]
        self.videos = [self.video(5, seed=23), self.video(5, seed=24, num_scenes=3)]


class LlavaVideo(OneVision):
    """The same of LLaVA-Video: newlines behind rows."""

    prompt, video = staticmethod(llava_video.prompt), staticmethod(llava_video.video)
    seeds = (44, 22)  # whose answers have no token that is taken for padding


# Tokens numbered anew, as published, or in their places and counting for what they are; and another model.
@pytest.fixture(scope="module", params=["published", "kept and sized", "LLaVA-Video"])
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(case, model):
    return llava_video.small_model() if case == "LLaVA-Video" else model


@pytest.fixture(scope="module")
def plain(case, model):
    return (llava_video.PlainLlavaVideo if case == "LLaVA-Video" else PlainModel)(model)


@pytest.fixture(scope="module")
def backbone(case, model, plain, settings) -> OneVision:
    if case == "LLaVA-Video":
        return LlavaVideo(model, plain, model.config.holitom_config)
    places = {"position_ids": "kept", "proportional_attention": True} if case == "kept and sized" else {}
    return OneVision(model, plain, replace(settings, **places))


@pytest.fixture(scope="module")
def upstream(case, model):
    """Upstream's class with the same weights."""
    if case == "LLaVA-Video":
        pytest.skip("transformers has no class of LLaVA-Video")
    upstream = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**SMALL)).eval()
    upstream.load_state_dict(model.state_dict())
    return upstream


@pytest.fixture(scope="module")
def used(backbone):
    """The settings, which are the model's meanwhile."""
    before, backbone.model.config.holitom_config = backbone.model.config.holitom_config, backbone.settings
    yield backbone.settings
    backbone.model.config.holitom_config = before


@pytest.fixture(scope="module")
def reference(plain, used, backbone) -> PlainGenerator:
    return PlainGenerator.over(plain, backbone.prompts, [[video] for video in backbone.videos], used)


@pytest.fixture
def batch(backbone):
    ids, mask = pad_batch(backbone.prompts)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": torch.stack(backbone.videos)}


@pytest.fixture
def single(backbone):
    return {"input_ids": backbone.prompts[0][None], "pixel_values_videos": backbone.videos[0][None]}


def text_only(inputs) -> dict:
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


def expected(reference, inputs, **kwargs):
    torch.manual_seed(5)
    return reference.generate(**text_only(inputs), **kwargs, use_cache=False)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "sampling, top-k and top-p": {"do_sample": True, "top_k": 20, "top_p": 0.9},
    "sampling, several sequences": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam search, several sequences": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "temperature": 2.0},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "bad words": {"do_sample": False, "bad_words_ids": [[i] for i in range(3, 60)]},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_modes(model, reference, batch, mode):
    torch.manual_seed(5)
    outputs = model.generate(**batch, **MODES[mode], max_new_tokens=NEW)
    assert torch.equal(outputs, expected(reference, batch, **MODES[mode], max_new_tokens=NEW))


class TestAssistedDecoding:
    """The draft changes how many tokens a step checks, never which come out."""

    def small_text_model(self):
        torch.manual_seed(3)
        text = {name: value for name, value in SMALL["text_config"].items() if name != "model_type"}
        return AutoModelForCausalLM.from_config(Qwen2Config(**text | {"num_hidden_layers": 1})).eval()

    @pytest.mark.parametrize("assistant", ["text model", "upstream's class", "the model itself", "prompt lookup"])
    def test_the_answer_is_the_greedy_one(self, request, model, reference, single, assistant):
        kwargs = {
            "text model": lambda: {"assistant_model": self.small_text_model()},
            "upstream's class": lambda: {"assistant_model": request.getfixturevalue("upstream")},
            "the model itself": lambda: {"assistant_model": model},
            "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
        }[assistant]()
        outputs = model.generate(**single, **kwargs, do_sample=False, max_new_tokens=10)
        assert torch.equal(outputs, expected(reference, single, do_sample=False, max_new_tokens=10))


class TestOptions:
    def test_scores_hidden_states_and_attentions(self, model, reference, batch):
        eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        outputs = eager.generate(
            **batch, **wanted, output_hidden_states=True, output_attentions=True, do_sample=False, max_new_tokens=NEW
        )
        plain = expected(reference, batch, **wanted, do_sample=False, max_new_tokens=NEW)
        for ours, theirs in zip(outputs.logits + outputs.scores, plain.logits + plain.scores):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        # Lengths are those inside: N before stage 3 (layer 2), M from it on, one more with every step.
        record = cache_of(outputs).compressed_sequence
        n, m = record.outer_mask.shape[1], record.inner_mask.shape[1]
        assert m < n < batch["input_ids"].shape[1]
        assert [states.shape[1] for states in outputs.hidden_states[0]] == [n, n, n, m, m, m]
        assert [weights.shape[-1] for weights in outputs.attentions[0]] == [n, n, m, m, m]
        for step in range(1, NEW):
            assert [states.shape[1] for states in outputs.hidden_states[step]] == [1] * 6
            assert [weights.shape[-1] for weights in outputs.attentions[step]] == [n + step] * 2 + [m + step] * 3

    def test_one_new_token(self, model, reference, batch):
        outputs = model.generate(**batch, do_sample=False, max_new_tokens=1)
        assert torch.equal(outputs, expected(reference, batch, do_sample=False, max_new_tokens=1))

    def test_all_logits_of_the_prompt(self, model, batch):
        outputs = model.generate(
            **batch, do_sample=False, max_new_tokens=2, logits_to_keep=0, return_dict_in_generate=True
        )
        assert torch.equal(outputs.sequences, model.generate(**batch, do_sample=False, max_new_tokens=2))

    def test_a_prompt_that_is_to_be_prefilled_in_chunks(self, model, reference, batch):
        outputs = model.generate(**batch, do_sample=False, max_new_tokens=NEW, prefill_chunk_size=16)
        assert torch.equal(outputs, expected(reference, batch, do_sample=False, max_new_tokens=NEW))

    def test_a_streamer_gets_the_prompt_and_then_every_token(self, model, reference, single):
        class Recorder(TextStreamer):
            def __init__(self):
                self.pieces = []

            def put(self, value):
                self.pieces.append(value.flatten())

            def end(self):
                self.pieces.append("end")

        streamer = Recorder()
        model.generate(**single, do_sample=False, max_new_tokens=NEW, streamer=streamer)
        tokens = expected(reference, single, do_sample=False, max_new_tokens=NEW)[0]
        assert torch.equal(torch.cat(streamer.pieces[:-1]), tokens)
        assert streamer.pieces[-1] == "end"

    def test_stopping_strings_and_an_end_token(self, model, reference, single, backbone):
        tokens = expected(reference, single, do_sample=False, max_new_tokens=NEW)[0, backbone.prompts[0].shape[0] :]
        end = int(tokens[2])
        outputs = model.generate(**single, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
        stop = tokens.tolist().index(end) + 1
        assert torch.equal(outputs[0, backbone.prompts[0].shape[0] :], tokens[:stop])
        tokenizer = tiny_tokenizer()
        text = tokenizer.decode(tokens[2:4])
        outputs = model.generate(
            **single, do_sample=False, max_new_tokens=NEW, stop_strings=[text], tokenizer=tokenizer
        )
        assert torch.equal(
            outputs[0, backbone.prompts[0].shape[0] :], tokens[: outputs.shape[1] - backbone.prompts[0].shape[0]]
        )
        assert outputs.shape[1] - backbone.prompts[0].shape[0] <= 4

    def test_embeddings_and_encoded_videos_in_place_of_ids_and_pixels(self, model, reference, single, backbone):
        embeds = model.get_input_embeddings()(single["input_ids"]).detach()
        tokens = expected(reference, single, do_sample=False, max_new_tokens=NEW)[:, backbone.prompts[0].shape[0] :]
        for beams in (1, 2):
            kwargs = {"do_sample": False, "max_new_tokens": NEW, "num_beams": beams}
            given = {"inputs_embeds": embeds, "pixel_values_videos": single["pixel_values_videos"]}
            plain = expected(reference, single, **kwargs)[:, backbone.prompts[0].shape[0] :] if beams > 1 else tokens
            assert torch.equal(model.generate(**given, **kwargs), plain)
            encoded = {"video": model.get_video_features(single["pixel_values_videos"])}
            outputs = model.generate(input_ids=single["input_ids"], mm_encoder_outputs=encoded, **kwargs)
            assert torch.equal(outputs[:, backbone.prompts[0].shape[0] :], plain)


CACHES = {
    "DynamicCache of the caller": lambda model: {"cache": DynamicCache()},
    "DynamicCache of the caller, with a config": lambda model: {"cache": DynamicCache(config=model.config)},
    "StaticCache": lambda model: {"cache_implementation": "static"},
    "StaticCache of the caller": lambda model: {"cache": StaticCache(model.config, max_cache_len=120)},
    "no cache": lambda model: {"use_cache": False},
}


class TestCaches:
    @pytest.mark.parametrize("cache", CACHES)
    @pytest.mark.parametrize("mode", ["greedy", "sampling", "beam search, several sequences"])
    def test_every_cache_gives_the_same_answer(self, model, reference, batch, cache, mode):
        torch.manual_seed(5)
        outputs = model.generate(**batch, **MODES[mode], **CACHES[cache](model), max_new_tokens=NEW)
        assert torch.equal(outputs, expected(reference, batch, **MODES[mode], max_new_tokens=NEW))

    @pytest.mark.parametrize("backend", [pytest.param("quanto", marks=pytest.mark.slow), "fp8"])
    def test_a_quantized_cache_quantizes_the_short_sequence(self, model, upstream, batch, backend):
        pytest.importorskip("optimum.quanto" if backend == "quanto" else "torch")
        config = {"backend": backend}
        if backend == "quanto":
            config |= {"nbits": 4, "q_group_size": 8, "residual_length": 4}
        kwargs = {"do_sample": False, "cache_implementation": "quantized", "cache_config": config}
        try:
            upstream.generate(**batch, **kwargs, max_new_tokens=2)
        except Exception as error:
            pytest.skip(f"upstream's class does not run with it here: {error}")
        outputs = model.generate(
            **batch, **kwargs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True
        )
        exact = model.generate(
            **batch, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True
        )
        # The prompt's last logits come before anything is quantized; the next ones are close to exact.
        assert torch.equal(outputs.logits[0], exact.logits[0])
        similarity = torch.nn.functional.cosine_similarity(outputs.logits[1], exact.logits[1], dim=-1)
        assert torch.equal(outputs.sequences[:, : 1 - NEW], exact.sequences[:, : 1 - NEW])
        assert similarity.min() > 0.9
        record = cache_of(outputs).compressed_sequence
        lengths = [cache_of(outputs).get_seq_length(layer) for layer in range(5)]
        n, m = record.outer_mask.shape[1], record.inner_mask.shape[1]
        assert lengths == [n + NEW - 1] * 2 + [m + NEW - 1] * 3

    def test_layers_from_stage_3_on_hold_less_memory(self, model, upstream, batch):
        kwargs = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True}
        ours, theirs = (cache_of(m.generate(**batch, **kwargs)) for m in (model, upstream))

        def size(layer):
            return layer.keys.nbytes + layer.values.nbytes

        record = ours.compressed_sequence
        full, n, m = batch["input_ids"].shape[1], record.outer_mask.shape[1], record.inner_mask.shape[1]
        for layer, (short, long) in enumerate(zip(ours.layers, theirs.layers)):
            assert size(short) / size(long) == pytest.approx((n if layer < 2 else m) / full)
        assert m < 0.7 * n
        assert n < 0.5 * full

    def test_a_static_cache_can_be_reset_and_used_for_another_prompt(self, model, reference, batch, backbone):
        cache = StaticCache(model.config, max_cache_len=120)
        model.generate(**batch, do_sample=False, max_new_tokens=3, cache=cache)
        cache.reset()
        outputs = model.generate(**batch, do_sample=False, max_new_tokens=NEW, cache=cache)
        assert torch.equal(outputs, expected(reference, batch, do_sample=False, max_new_tokens=NEW))
        cache.reset()
        ids = backbone.prompt(9)[None].expand(2, -1)
        text = model.generate(input_ids=ids, do_sample=False, max_new_tokens=3, cache=cache)
        assert torch.equal(text, model.generate(input_ids=ids, do_sample=False, max_new_tokens=3))


class TestTurns:
    """A conversation goes on with the same cache; the caller counts every placeholder."""

    def second_turn(self, first, question):
        return torch.cat([first, question], dim=1)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_a_second_question(self, model, plain, used, batch, cache, backbone):
        past = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=140)
        greedy = {"do_sample": False, "max_new_tokens": NEW}
        first = model.generate(**batch, **greedy, cache=past)
        question = torch.stack([backbone.prompt(4, seed=31), backbone.prompt(4, seed=32)])
        ids = torch.cat([first, question], 1)
        mask = torch.nn.functional.pad(
            batch["attention_mask"], (0, ids.shape[1] - batch["input_ids"].shape[1]), value=1
        )
        second = model.generate(input_ids=ids, attention_mask=mask, **greedy, cache=past)
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        lengths = [len(prompt) for prompt in backbone.prompts]
        reference = PlainGenerator.over(plain, whole, [[v] for v in backbone.videos], used, prompt_lengths=lengths)
        plain_ids, plain_mask = pad_batch(whole)
        expected = reference.generate(input_ids=plain_ids, attention_mask=plain_mask, **greedy, use_cache=False)
        assert torch.equal(second[:, -NEW:], expected[:, -NEW:])
        assert torch.equal(second[:, : ids.shape[1]], ids)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_padding_inside_a_second_turn(self, model, plain, used, batch, cache, backbone):
        past = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=140)
        greedy = {"do_sample": False, "max_new_tokens": NEW}
        first = model.generate(**batch, **greedy, cache=past)
        question, is_question = pad_batch([backbone.prompt(7, seed=31), backbone.prompt(3, seed=32)])
        ids = torch.cat([first, question], 1)
        answered = torch.ones(2, NEW, dtype=torch.long)
        mask = torch.cat([batch["attention_mask"], answered, is_question], 1)
        wanted = {"output_logits": True, "return_dict_in_generate": True}
        second = model.generate(input_ids=ids, attention_mask=mask, **greedy, **wanted, cache=past)
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        lengths = [len(prompt) for prompt in backbone.prompts]
        reference = PlainGenerator.over(plain, whole, [[v] for v in backbone.videos], used, prompt_lengths=lengths)
        plain_ids, plain_mask = pad_batch(whole)
        expected = reference.generate(
            input_ids=plain_ids, attention_mask=plain_mask, **greedy, **wanted, use_cache=False
        )
        assert torch.equal(second.sequences[:, -NEW:], expected.sequences[:, -NEW:])
        for ours, theirs in zip(second.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("given", ["ids", "embeddings"])
    def test_a_second_video_with_beams(self, model, plain, used, batch, given, backbone):
        """Placeholders of the first turn's videos are in the ids, too, but not theirs that are encoded now."""
        past = DynamicCache()
        first = model.generate(**batch, do_sample=False, max_new_tokens=NEW, cache=past)
        past.batch_repeat_interleave(2)
        videos = [backbone.video(4, seed=33), backbone.video(4, seed=34), backbone.video(4, seed=35, num_scenes=1)]
        turn, is_turn = pad_batch(
            [backbone.prompt(2, "video:4", 5, seed=34), backbone.prompt("video:4", "video:4", 3, seed=35)]
        )
        ids = torch.cat([first, turn], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long), is_turn], 1)
        beams = {"do_sample": False, "num_beams": 2, "max_new_tokens": NEW}
        tokens = {
            "ids": lambda: {"input_ids": ids},
            "embeddings": lambda: {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
        }[given]()
        second = model.generate(
            **tokens, attention_mask=mask, pixel_values_videos=torch.stack(videos), **beams, cache=past
        )
        whole = [row[keep.bool()] for row, keep in zip(ids, mask)]
        reference = PlainGenerator.over(
            plain,
            whole,
            [[backbone.videos[0], videos[0]], [backbone.videos[1], videos[1], videos[2]]],
            used,
            prompt_lengths=[
                [len(backbone.prompts[0]), len(whole[0])],
                [len(backbone.prompts[1]), len(whole[1]), len(whole[1])],
            ],
        )
        plain_ids, plain_mask = pad_batch(whole)
        expected = reference.generate(input_ids=plain_ids, attention_mask=plain_mask, **beams, use_cache=False)
        assert torch.equal(second[:, -NEW:], expected[:, -NEW:])

    def test_only_the_new_tokens_may_be_passed_with_the_whole_mask(self, model, single, backbone):
        past = DynamicCache()
        greedy = {"do_sample": False, "max_new_tokens": NEW}
        first = model.generate(**single, **greedy, cache=past)
        copied = copy.deepcopy(past)
        ids = torch.cat([first, backbone.prompt(4, seed=31)[None]], 1)
        whole = model.generate(input_ids=ids, **greedy, cache=past)
        # The last answered token is not in the cache yet.
        new = ids[:, first.shape[1] - 1 :]
        short = model.generate(input_ids=new, attention_mask=torch.ones_like(ids), **greedy, cache=copied)
        assert torch.equal(short[:, -NEW:], whole[:, -NEW:])

    def test_a_second_video_is_compressed_and_the_first_stays_as_it_was(self, model, plain, used, single, backbone):
        """The plain loop chooses each video's survivors by the last token of the turn that brought it."""
        past = DynamicCache()
        greedy = {"do_sample": False, "max_new_tokens": NEW}
        first = model.generate(**single, **greedy, cache=past)
        before = copy.deepcopy(past.compressed_sequence)
        keys = [layer.keys.clone() for layer in past.layers]
        video = backbone.video(4, seed=33)
        turn = backbone.prompt(2, "video:4", 5, seed=34)
        ids = torch.cat([first[0], turn])[None]
        second = model.generate(input_ids=ids, pixel_values_videos=video[None], **greedy, cache=past)
        for layer, kept in zip(past.layers, keys):
            assert torch.equal(layer.keys[:, :, : kept.shape[2]], kept)
        record = past.compressed_sequence
        moves_up = used.position_ids == "packed"
        assert (record.position_offset[0] > before.position_offset[0]) == moves_up
        assert record.full_length == ids.shape[1]
        lengths = [len(backbone.prompts[0]), ids.shape[1]]
        logits = []
        whole = ids[0]
        encoded = [plain.encode(backbone.videos[0], used), plain.encode(video, used)]
        for _ in range(NEW):
            logits.append(plain.logits(whole, None, used, lengths, encoded=encoded)[-1])
            whole = torch.cat([whole, logits[-1].argmax()[None]])
        assert torch.equal(second[0], whole)

    def test_one_video_many_questions_by_copying_the_cache(self, model, plain, used, backbone):
        """The video's prefix is encoded once; its stage 3 asks the prefix's last token."""
        prefix = backbone.prompt(3, "video:5", 2, seed=35)
        past = DynamicCache()
        with torch.no_grad():
            model(input_ids=prefix[None], pixel_values_videos=backbone.videos[0][None], cache=past, use_cache=True)
        for seed in (36, 37):
            prompt = torch.cat([prefix, backbone.prompt(6, seed=seed)])
            outputs = model.generate(
                input_ids=prompt[None], cache=copy.deepcopy(past), do_sample=False, max_new_tokens=NEW
            )
            tokens, _ = plain.generate(prompt, [backbone.videos[0]], used, NEW, prompt_length=len(prefix))
            assert torch.equal(outputs[0, len(prompt) :], tokens)

    def test_one_video_many_questions_as_a_batch(self, model, plain, used, backbone):
        prefix = backbone.prompt(3, "video:5", 2, seed=35)
        past = DynamicCache()
        with torch.no_grad():
            model(input_ids=prefix[None], pixel_values_videos=backbone.videos[0][None], cache=past, use_cache=True)
        past.batch_repeat_interleave(3)
        prompts = torch.stack([torch.cat([prefix, backbone.prompt(6, seed=seed)]) for seed in (36, 37, 38)])
        outputs = model.generate(input_ids=prompts, cache=past, do_sample=False, max_new_tokens=NEW)
        for row, prompt in enumerate(prompts):
            tokens, _ = plain.generate(prompt, [backbone.videos[0]], used, NEW, prompt_length=len(prefix))
            assert torch.equal(outputs[row, len(prompt) :], tokens)

    def test_rows_that_were_selected_cannot_be_told_and_are_refused(self, model, batch):
        past = DynamicCache()
        model.generate(**batch, do_sample=False, max_new_tokens=2, cache=past)
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="compressed for 2 rows and is now used with 3: rows can be repeated"):
            model(input_ids=torch.ones(3, 1, dtype=torch.long), cache=past)

    def test_another_layer_for_a_later_video_is_refused(self, model, single, backbone):
        past = DynamicCache()
        model.generate(**single, do_sample=False, max_new_tokens=2, cache=past)
        with pytest.raises(ValueError, match="inner_merge_layer is 3, but the cache was compressed from layer 2 on"):
            model(
                input_ids=backbone.prompt("video:4", 2)[None],
                pixel_values_videos=backbone.video(4, seed=1)[None],
                cache=past,
                holitom_config={"inner_merge_layer": 3},
            )


def only_2d_masks(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """An attention function that takes what flash attention takes: a 2D mask or none, causal from the end."""
    assert attention_mask is None or attention_mask.ndim == 2
    batch_size, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    key, value = (t.repeat_interleave(num_heads // t.shape[1], 1) for t in (key, value))
    is_causal = module.is_causal
    outputs = []
    for row in range(batch_size):
        real = torch.ones(num_keys, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        asks = real[-num_queries:]
        if (position_ids := kwargs.get("position_ids")) is not None and attention_mask is None and batch_size == 1:
            # As flash attention does: positions that don't go on mean several sequences in one row.
            steps = position_ids[0].diff()
            assert (steps == 1).all(), "this row would be taken for packed sequences"
        q, k, v = query[row][:, asks], key[row][:, real], value[row][:, real]
        scores = (q @ k.mT).float() * scaling
        if is_causal:
            shift = k.shape[1] - q.shape[1]
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(shift + 1), -torch.inf)
        row_output = torch.zeros_like(query[row])
        row_output[:, asks] = scores.softmax(-1).to(q.dtype) @ v
        outputs.append(row_output)
    return torch.stack(outputs).transpose(1, 2).contiguous(), None


class TestAttention:
    def with_attention(self, model, implementation):
        other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=implementation).eval()
        other.load_state_dict(model.state_dict())
        return other

    def test_flash_attention_needs_nothing_but_a_2d_mask(self, model, plain, used, reference, batch, single, backbone):
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register("only_2d_masks", only_2d_masks)
        ALL_MASK_ATTENTION_FUNCTIONS.register("only_2d_masks", flash_attention_mask)
        other = self.with_attention(model, "only_2d_masks")
        if used.proportional_attention:  # which no 2D mask can hold
            with pytest.raises(ValueError, match="'only_2d_masks' cannot: load the model with attn_implementation"):
                other.generate(**single, max_new_tokens=1)
            used = other.config.holitom_config = replace(used, proportional_attention=False)
            reference = PlainGenerator.over(plain, backbone.prompts, [[video] for video in backbone.videos], used)
        for inputs in (batch, single):
            for kwargs in ({}, {"use_cache": False}, {"num_beams": 2}):
                outputs = other.generate(**inputs, **kwargs, do_sample=False, max_new_tokens=NEW)
                beams = {name: value for name, value in kwargs.items() if name == "num_beams"}
                assert torch.equal(outputs, expected(reference, inputs, **beams, do_sample=False, max_new_tokens=NEW))
        with torch.no_grad():
            ours, theirs = other(**batch), model(**batch, holitom_config=used)
        assert all(torch.equal(a, b) for a, b in zip(ours.inner_keep, theirs.inner_keep))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
    def test_other_implementations(self, model, reference, batch, implementation):
        other = self.with_attention(model, implementation)
        # flex_attention's compiled kernel needs a GPU; its meaning can be had without compiling.
        stance = (
            torch.compiler.set_stance("force_eager")
            if implementation == "flex_attention"
            else warnings.catch_warnings()
        )
        with torch.no_grad(), stance, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = other.generate(**batch, do_sample=False, max_new_tokens=NEW)
            kept = other(**batch).inner_keep
        assert torch.equal(outputs, expected(reference, batch, do_sample=False, max_new_tokens=NEW))
        assert all(torch.equal(a, b) for a, b in zip(kept, model(**batch).inner_keep))


@pytest.mark.parametrize("case", ["published", "kept and sized"], indirect=True)
class TestCompile:
    def test_the_decoding_step_compiles_without_a_graph_break(self, model, reference, single):
        """fullgraph=True fails on any break; upstream's class has none either."""
        config = CompileConfig(fullgraph=True, backend="eager")
        config._compile_all_devices = True
        compiled = type(model)(copy.deepcopy(model.config)).eval()
        compiled.load_state_dict(model.state_dict())
        outputs = compiled.generate(
            **single, do_sample=False, max_new_tokens=NEW, cache_implementation="static", compile_config=config
        )
        assert torch.equal(outputs, expected(reference, single, do_sample=False, max_new_tokens=NEW))

    def test_padded_rows_compile_too(self, model, reference, batch):
        config = CompileConfig(fullgraph=True, backend="eager")
        config._compile_all_devices = True
        compiled = type(model)(copy.deepcopy(model.config)).eval()
        compiled.load_state_dict(model.state_dict())
        outputs = compiled.generate(
            **batch, do_sample=False, max_new_tokens=NEW, cache_implementation="static", compile_config=config
        )
        assert torch.equal(outputs, expected(reference, batch, do_sample=False, max_new_tokens=NEW))


def test_upstreams_class_is_what_it_is_compared_with(upstream):
    assert type(upstream) is LlavaOnevisionForConditionalGeneration
