"""Visual entries dropped behind the first step of an answer, against a full cache in which masks hide them."""

import copy
from dataclasses import replace

import pytest
import torch

from holitom_hf.models.evicting import evicting
from holitom_hf.models.upstream import cache_of

from ..conftest import make_prompt, make_video, pad_batch


RATIO, STEPS = 0.6, 4
GREEDY = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None}
# (text before the video, frames, text behind it) of each row.
ROWS = ((3, 6, 8), (2, 4, 3))
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def eager(subject):
    """Attention that says what it gives to each entry."""
    subject.model.set_attn_implementation("eager")
    yield
    subject.model.set_attn_implementation("sdpa")


def batch_of(subject, seed: int = 0) -> tuple[dict, list]:
    """Inputs of a batch, and its videos."""
    prompts = [subject.prompt(*row, seed=seed + number) for number, row in enumerate(ROWS)]
    videos = [subject.video(frames, seed=seed + 10 + number) for number, (_, frames, _) in enumerate(ROWS)]
    return subject.inputs(prompts, videos), videos


def steps_of(model, cache, mask, tokens: list[torch.Tensor], **kwargs) -> list:
    """Outputs of decoding steps, one after another in a cache."""
    found = []
    for token in tokens:
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        found.append(model(input_ids=token, attention_mask=mask, cache=cache, **kwargs))
    return found


def drawn_tokens(num_rows: int, seed: int = 3) -> list[torch.Tensor]:
    return list(torch.randint(3, 40, (STEPS, num_rows, 1), generator=torch.Generator().manual_seed(seed)))


def visual_places(subject, inputs, videos, outputs, settings) -> list[list[list[int]]]:
    """By stage 3's sides and rows, where the cache holds what the plain merge leaves of a video."""
    record, mask = cache_of(outputs).compressed_sequence, mask_of(inputs).bool()
    before, behind = [], []
    for row, (ids, is_real, video) in enumerate(zip(inputs["input_ids"], mask, videos)):
        encoded = subject.plain.encode(*([video] if torch.is_tensor(video) else video), settings)
        is_video = (ids[is_real] == subject.config.video_token_id).tolist()
        slots = [sum(is_video[:i]) for i in range(len(is_video))]
        left = [is_video[i] for i in range(len(is_video)) if not is_video[i] or slots[i] in encoded.slots]
        inside = left if outputs.inner_keep is None else [left[i] for i in outputs.inner_keep[row].tolist()]
        for found, real, flags in ((before, record.outer_mask, left), (behind, record.inner_mask, inside)):
            places = real[row].nonzero()[:, 0].tolist()
            assert len(places) == len(flags)
            found.append([place for place, flag in zip(places, flags) if flag])
    return [before, behind]


def plain_choice(received: list[float], ratio: float) -> list[int]:
    """The entries that go, of scores in order."""
    shared = [max(received[max(0, i - 1) : i + 2]) for i in range(len(received))]
    number = max(1, round(len(received) * (1 - ratio)))
    kept = sorted(range(len(received)), key=lambda i: (-shared[i], i))[:number]
    return [i for i in range(len(received)) if i not in kept]


class Hiding:
    """Within it, attention of each layer does not see certain entries of each row."""

    def __init__(self, model, hidden: list[list[list[int]]]):
        self.layers, self.hidden, self.handles = model.model.language_model.layers, hidden, []

    def __enter__(self):
        for layer, rows in zip(self.layers, self.hidden):

            def hide(module, args, kwargs, rows=rows):
                mask = kwargs["attention_mask"].clone().expand(len(rows), -1, -1, -1).clone()
                for row, places in enumerate(rows):
                    mask[row, ..., places] = torch.finfo(mask.dtype).min
                return args, kwargs | {"attention_mask": mask}

            self.handles.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def mask_of(inputs) -> torch.Tensor:
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))


def plain_evictions(record, weights: tuple[torch.Tensor, ...], visual: list[list[list[int]]]) -> list:
    """By layer and row, what goes, from the attention (B, H, 1, S) that the first step of an answer paid."""
    gone = []
    for layer, given in enumerate(weights):
        received = given[:, :, 0].clamp_min(1e-38).log().mean(1)  # products, less a number for all
        side = visual[0 if record.inner_layer is None or layer < record.inner_layer else 1]
        chosen = [plain_choice([float(received[row, p]) for p in places], RATIO) for row, places in enumerate(side)]
        gone.append([[places[i] for i in of_row] for places, of_row in zip(side, chosen)])
    return gone


@pytest.mark.parametrize("has_inner", [True, False])
@torch.no_grad()
def test_later_steps_are_those_of_a_full_cache_that_hides_what_is_gone(subject, has_inner):
    model, (inputs, videos) = subject.model, batch_of(subject)
    settings = replace(model.config.holitom_config, **({} if has_inner else {"inner_merge_layer": None}))
    inputs["holitom_config"], tokens = settings, drawn_tokens(len(ROWS))
    full = model(**inputs)
    visual = visual_places(subject, inputs, videos, full, settings)
    [first] = steps_of(model, cache_of(full), mask_of(inputs), tokens[:1], output_attentions=True)
    whole = cache_of(full).compressed_sequence
    gone = plain_evictions(whole, first.attentions, visual)
    assert all(rows[0] and rows[1] for rows in gone)
    assert len({str(rows) for rows in gone}) > 2  # layers choose for themselves
    with Hiding(model, gone):
        mask = torch.cat([mask_of(inputs), torch.ones_like(tokens[0])], 1)
        expected = [first, *steps_of(model, cache_of(full), mask, tokens[1:])]

    with evicting(model, RATIO):
        outputs = model(**inputs)
        ours = steps_of(model, cache_of(outputs), mask_of(inputs), tokens)
    for step, plain in zip(ours, expected):
        torch.testing.assert_close(step.logits, plain.logits, **CLOSE)

    # The cache holds what it held, but for visual entries, and no memory of those.
    record = cache_of(outputs).compressed_sequence
    for layer, (old, new) in enumerate(zip(cache_of(full).layers, cache_of(outputs).layers)):
        is_outer = record.inner_layer is None or layer < record.inner_layer
        before, after = ((r.outer_mask if is_outer else r.inner_mask) for r in (whole, record))
        lengths = []
        for row, lost in enumerate(gone[layer]):
            left = [p for p in before[row].nonzero()[:, 0].tolist() if p not in lost]
            stays = after[row].nonzero()[:, 0].tolist()
            lengths.append(len(left))
            assert len(stays) == len(left) + 1  # and the step's own token
            for states, others in ((new.keys, old.keys), (new.values, old.values)):
                torch.testing.assert_close(states[row][:, stays[:-1]], others[row][:, left], **CLOSE)
        assert new.keys.shape[2] == max(lengths) + STEPS < old.keys.shape[2]
        for states in (new.keys, new.values):
            assert states.untyped_storage().nbytes() == states.numel() * states.element_size()


@torch.no_grad()
def test_generation_is_that_loop_and_a_ratio_of_nothing_changes_nothing(subject):
    model, (inputs, _) = subject.model, batch_of(subject)
    greedy = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **greedy)
    with evicting(model, 0.0):
        same = model.generate(**inputs, **greedy)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, same.logits))
    with evicting(model, RATIO):
        answer = model.generate(**inputs, **greedy)
        outputs = model(**inputs)
        new = answer.sequences[:, inputs["input_ids"].shape[1] :]
        steps = steps_of(model, cache_of(outputs), mask_of(inputs), list(new.T[:-1, :, None]))
    for given, step in zip(answer.logits[1:], steps):
        torch.testing.assert_close(given, step.logits[:, -1], **CLOSE)
    assert torch.equal(plain.logits[1], answer.logits[1])  # it goes behind this step
    assert not torch.allclose(plain.logits[2], answer.logits[2], **CLOSE)


class TestConversations:
    """Of LLaVA-OneVision."""

    @pytest.fixture(autouse=True)
    def eager(self):
        """As loaded."""

    ROWS = ((3, "video:5", 8), (2, "video:5", 3))

    def inputs(self, seed: int, side: str = "left") -> dict:
        ids, mask = pad_batch([make_prompt(*row, seed=seed + i) for i, row in enumerate(self.ROWS)], side)
        videos = torch.stack([make_video(5, seed=seed + 10 + i) for i in range(len(self.ROWS))])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": videos}

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_rows_of_a_batch_answer_as_alone(self, model, num_beams):
        inputs = self.inputs(0)
        with evicting(model, RATIO):
            batch = model.generate(**inputs, **GREEDY, num_beams=num_beams)
            for row in range(2):
                is_real = inputs["attention_mask"][row].bool()
                alone = {name: values[row : row + 1] for name, values in inputs.items()}
                alone = {n: v[:, is_real] if v.ndim == 2 else v for n, v in alone.items()}
                answer = model.generate(**alone, **GREEDY, num_beams=num_beams)
                assert torch.equal(answer[0, -STEPS:], batch[row, -STEPS:])

    @torch.no_grad()
    def test_padding_on_the_right_is_that_on_the_left(self, model):
        found = []
        for side in ("left", "right"):
            inputs = self.inputs(0, side)
            with evicting(model, RATIO):
                steps = steps_of(model, cache_of(model(**inputs)), inputs["attention_mask"], drawn_tokens(2))
            found.append(torch.cat([step.logits for step in steps]))
        torch.testing.assert_close(*found, **CLOSE)

    @torch.no_grad()
    def test_a_further_question_drops_nothing_and_its_answer_drops_once(self, model):
        inputs, tokens = self.inputs(0), drawn_tokens(2)
        question = make_prompt(6, seed=5).view(2, 3)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
        with evicting(model, RATIO):
            cache = cache_of(model(**inputs))
            lengths = [layer.get_seq_length() for layer in cache.layers]
            model(input_ids=question, attention_mask=mask, cache=cache)
            assert [layer.get_seq_length() for layer in cache.layers] == [length + 3 for length in lengths]
            copies = copy.deepcopy(cache)
            results = []
            for past in (cache, copies):
                steps = steps_of(model, past, mask, tokens)
                results.append(torch.cat([step.logits for step in steps]))
                assert past.get_seq_length() < lengths[0] + 3
                assert cache.get_seq_length() == past.get_seq_length()
        assert torch.equal(*results)

    @torch.no_grad()
    def test_a_second_video_loses_its_own_entries_alone(self, model):
        first, second, tokens = self.inputs(0), self.inputs(7), drawn_tokens(2)
        with evicting(model, RATIO):
            outputs = model(**first)
            steps_of(model, cache_of(outputs), first["attention_mask"], tokens)
            cache = cache_of(outputs)
            earlier = [(layer.keys.clone(), layer.get_seq_length()) for layer in cache.layers]
            mask = torch.cat([first["attention_mask"], torch.ones(2, STEPS).long(), second["attention_mask"]], 1)
            outputs = model(**second | {"attention_mask": mask}, cache=cache)
            record = copy.deepcopy(cache.compressed_sequence)
            longer = [layer.get_seq_length() for layer in cache.layers]
            [step] = steps_of(model, cache_of(outputs), mask, tokens[:1])
        now = cache.compressed_sequence
        assert now.full_length == mask.shape[1] + 1
        assert all(layer.get_seq_length() < length + 1 for layer, length in zip(cache.layers, longer))
        for layer, (keys, length) in enumerate(earlier):
            is_outer = layer < record.inner_layer
            before, after = ((r.outer_mask if is_outer else r.inner_mask) for r in (record, now))
            for row in range(2):
                old = before[row, :length].nonzero()[:, 0]
                new = after[row].nonzero()[:, 0][: len(old)]
                assert torch.equal(cache.layers[layer].keys[row][:, new], keys[row][:, old])
        # And all of it goes on as before.
        [following] = steps_of(model, cache_of(step), torch.cat([mask, torch.ones(2, 1).long()], 1), tokens[1:2])
        assert following.logits.isfinite().all()

    def test_what_is_refused(self, model):
        inputs = self.inputs(0)
        cases = {
            "from a DynamicCache alone": {"cache_implementation": "static"},
            "no visual entries .* there is none": {"use_cache": False},
            "no visual entries .* nothing in it was compressed": {
                "holitom_config": {"outer_method": "none", "inner_method": "none"}
            },
            "set proportional_attention=False": {"holitom_config": {"proportional_attention": True}},
            "set virtual_unmerging=False": {
                "holitom_config": {"virtual_unmerging": True, "inner_method": "none", "position_ids": "kept"}
            },
        }
        for message, ways in cases.items():
            with pytest.raises(ValueError, match=message), evicting(model, RATIO):
                model.generate(**inputs, **GREEDY, **ways)
        for arguments in ((1.0,), (-0.1,), (0.5, 2), (0.5, 0)):
            with pytest.raises(ValueError, match="expected 0 <= ratio < 1 and an odd"), evicting(model, *arguments):
                pass
        assert not any(
            "evict" in str(hook) or "score_layer" in str(hook)
            for module in model.modules()
            for hook in module._forward_hooks.values()
        )
