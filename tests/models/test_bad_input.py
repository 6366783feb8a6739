"""Each bad input gets one clear error before any heavy work, and leaves the model usable."""

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.answering.prompts import encode_videos
from holitom_hf.models.upstream import cache_of

from ..conftest import IDENTITY
from .qwen import token_types


@pytest.fixture
def inputs(subject):
    return subject.inputs([subject.prompt(3, 4, 5)], [subject.video(4, seed=1)])


@pytest.fixture
def no_work(subject):
    """Fails if the vision tower or the decoder runs."""

    def fail(*_):
        raise AssertionError("heavy work was done before the error")

    model = subject.model.model
    modules = (getattr(model, subject.tower), model.language_model.layers[0])
    handles = [module.register_forward_pre_hook(fail) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def num_placeholders(subject, num_frames: int) -> int:
    return int((subject.prompt(3, num_frames, 5) == subject.config.video_token_id).sum())


def about_another_prompt(subject, inputs: dict, ids: torch.Tensor) -> dict:
    """The same videos with other ids, (L,) or (B, L)."""
    ids = ids.reshape(-1, ids.shape[-1])
    types = {"mm_token_type_ids": token_types(ids)} if "mm_token_type_ids" in inputs else {}
    return inputs | {"input_ids": ids} | types


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("given", [None, IDENTITY])
class TestBeforeAnyWork:
    def check(self, subject, call, given, match, **inputs):
        model = subject.model
        if given is not None:
            inputs["holitom_config"] = given
        with pytest.raises(ValueError, match=match):
            model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_pixels_that_are_not_finite(self, subject, inputs, no_work, call, given, value):
        pixels = inputs["pixel_values_videos"].view(-1)
        pixels[len(pixels) // 2 + 5] = value
        self.check(subject, call, given, r"video 0 has NaN or infinite pixels in frame 2: check how", **inputs)

    def test_fewer_placeholders_than_the_video_needs(self, subject, inputs, no_work, call, given):
        inputs = about_another_prompt(subject, inputs, subject.prompt(3, 3, 5))
        found, needed = (num_placeholders(subject, frames) for frames in (3, 4))
        match = f"row 0 of the prompt has {found} video placeholders, but its videos need {needed}"
        self.check(subject, call, given, match, **inputs)

    def test_a_video_without_placeholders(self, subject, inputs, no_work, call, given):
        inputs = about_another_prompt(subject, inputs, subject.text(8, seed=0))
        self.check(subject, call, given, r"1 videos were passed, but the prompts have placeholders for 0", **inputs)

    def test_placeholders_without_a_video_in_the_second_row(self, subject, inputs, no_work, call, given):
        inputs = about_another_prompt(subject, inputs, subject.prompt(3, 4, 5).expand(2, -1))
        match = f"row 1 of the prompt has {num_placeholders(subject, 4)} video placeholders, but its videos need 0"
        self.check(subject, call, given, match, **inputs)

    @pytest.mark.parametrize("subject", ["llava_onevision"], indirect=True)
    def test_a_video_of_a_wrong_shape_or_without_frames(self, subject, inputs, no_work, call, given):
        inputs["pixel_values_videos"] = torch.zeros(1, 0, 3, 32, 32)
        self.check(subject, call, given, r"video 0 has shape \(0, 3, 32, 32\); expected \(frames,", **inputs)
        inputs["pixel_values_videos"] = torch.zeros(4, 3, 32, 32)
        self.check(subject, call, given, r"video 0 has shape \(3, 32, 32\); expected \(frames,", **inputs)


class TestCalls:
    def test_a_mask_of_a_wrong_length(self, subject, inputs, no_work):
        length = inputs["input_ids"].shape[1]
        with pytest.raises(
            ValueError, match=rf"attention_mask has shape \(1, {length - 1}\).*full length.*\(1, {length}\)"
        ):
            subject.model(**inputs, attention_mask=torch.ones(1, length - 1))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, \d+, \d+\).*must be 2D"):
            subject.model(**inputs, attention_mask=torch.ones(1, 1, length, length))

    def test_a_mask_of_a_wrong_length_on_a_compressed_cache(self, subject, inputs):
        with torch.no_grad():
            outputs = subject.model(**inputs)
        length = inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(1, 30\).*\(1, {length + 1}\)"):
            subject.model(
                input_ids=torch.tensor([[5]]),
                cache=cache_of(outputs),
                attention_mask=torch.ones(1, 30),
            )

    def test_labels_of_a_wrong_length(self, subject, inputs, no_work):
        with pytest.raises(
            ValueError, match=r"labels have shape \(1, 9\); they must have the full length of the input"
        ):
            subject.model(**inputs, labels=torch.zeros(1, 9, dtype=torch.long))

    def test_position_ids_of_a_wrong_shape(self, subject, inputs):
        length = inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=rf"position_ids must have shape \(batch, {length}\), got \(1, 5\)"):
            subject.model(**inputs, position_ids=torch.zeros(1, 5, dtype=torch.long))

    def test_stage_3_beyond_the_decoder(self, subject, inputs, no_work):
        with pytest.raises(ValueError, match=r"inner_merge_layer is 5, but the decoder has 5 layers: choose 1 to 4"):
            subject.model(**inputs, holitom_config=HoliTomConfig(inner_merge_layer=5))

    def test_features_encoded_without_importance(self, subject, inputs):
        with torch.no_grad():
            features = encode_videos(subject.model, inputs, holitom_config=IDENTITY)
        rest = {name: value for name, value in inputs.items() if name not in ("pixel_values_videos", "video_grid_thw")}
        with pytest.raises(ValueError, match=r"encoded videos carry no importance: encode them with"):
            subject.model(**rest, mm_encoder_outputs={"video": features})

    @pytest.mark.parametrize("subject", ["llava_onevision"], indirect=True)  # others have no newlines
    def test_too_many_tokens_for_the_placeholders(self, subject, inputs):
        settings = HoliTomConfig(
            retention_ratio=0.99, similarity_threshold=1.0, newline_position="row", inner_merge_layer=None
        )
        with pytest.raises(ValueError, match=r"has \d+ tokens, more than its 65 placeholders: lower the ratio"):
            subject.model(**inputs, holitom_config=settings)

    def test_a_batch_of_chunk_size_zero(self, subject, inputs, no_work):
        with pytest.raises(ValueError, match="vision_batch_size must be at least 1 or None, got 0"):
            subject.model(**inputs, vision_batch_size=0)

    def test_both_or_neither_kind_of_input(self, subject, inputs, no_work):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            subject.model(**{name: value for name, value in inputs.items() if name != "input_ids"})


def test_the_model_and_a_cache_stay_usable_after_an_error(subject, inputs):
    with torch.no_grad():
        first = subject.model(**inputs)
        expected = first.logits.clone()
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1)
        for bad in ({"attention_mask": mask[:, 1:]}, {"attention_mask": mask[None]}):
            with pytest.raises(ValueError, match="attention_mask"):
                subject.model(input_ids=torch.tensor([[5]]), cache=cache_of(first), **bad)
        after = subject.model(input_ids=torch.tensor([[5]]), cache=cache_of(first)).logits
        again = subject.model(**inputs)
        fresh = subject.model(input_ids=torch.tensor([[5]]), cache=cache_of(again)).logits
    assert torch.equal(again.logits, expected)
    assert torch.equal(after, fresh)
