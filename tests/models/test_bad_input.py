"""Each bad input gets one clear error before any heavy work, and leaves the model usable."""

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.models.upstream import cache_of

from ..conftest import IDENTITY, TOKENS_PER_FRAME, make_prompt, make_video, pad_batch


@pytest.fixture
def inputs():
    return {"input_ids": make_prompt(3, "video:4", 5)[None], "pixel_values_videos": make_video(4, seed=1)[None]}


@pytest.fixture
def no_work(model):
    """Fails if the vision tower or the decoder runs."""

    def fail(*_):
        raise AssertionError("heavy work was done before the error")

    handles = [
        module.register_forward_pre_hook(fail)
        for module in (model.model.vision_tower, model.model.language_model.layers[0])
    ]
    yield
    for handle in handles:
        handle.remove()


def usable(model, inputs, expected) -> bool:
    with torch.no_grad():
        return torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("given", [None, IDENTITY])
class TestBeforeAnyWork:
    def check(self, model, call, given, match, **inputs):
        if given is not None:
            inputs["holitom_config"] = given
        with pytest.raises(ValueError, match=match):
            model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_pixels_that_are_not_finite(self, model, inputs, no_work, call, given, value):
        inputs["pixel_values_videos"][0, 2, 1, 5, 5] = value
        self.check(model, call, given, r"video 0 has NaN or infinite pixels in frame 2: check how", **inputs)

    def test_fewer_placeholders_than_the_video_needs(self, model, inputs, no_work, call, given):
        inputs["input_ids"] = make_prompt(3, "video:3", 5)[None]
        match = rf"row 0 of the prompt has {3 * TOKENS_PER_FRAME + 1} video placeholders, but its videos need "
        self.check(model, call, given, match + str(4 * TOKENS_PER_FRAME + 1), **inputs)

    def test_a_video_without_placeholders(self, model, inputs, no_work, call, given):
        inputs["input_ids"] = make_prompt(8)[None]
        self.check(model, call, given, r"1 videos were passed, but the prompts have placeholders for 0", **inputs)

    def test_placeholders_without_a_video_in_the_second_row(self, model, no_work, call, given):
        ids, mask = pad_batch([make_prompt(3, "video:4", 5), make_prompt(3, "video:4", 5)])
        video = make_video(4, seed=1)[None]
        match = rf"row 1 of the prompt has {4 * TOKENS_PER_FRAME + 1} video placeholders, but its videos need 0"
        self.check(model, call, given, match, input_ids=ids, attention_mask=mask, pixel_values_videos=video)

    def test_a_video_of_a_wrong_shape_or_without_frames(self, model, inputs, no_work, call, given):
        inputs["pixel_values_videos"] = torch.zeros(1, 0, 3, 32, 32)
        self.check(model, call, given, r"video 0 has shape \(0, 3, 32, 32\); expected \(frames,", **inputs)
        inputs["pixel_values_videos"] = torch.zeros(4, 3, 32, 32)
        self.check(model, call, given, r"video 0 has shape \(3, 32, 32\); expected \(frames,", **inputs)


class TestCalls:
    def test_a_mask_of_a_wrong_length(self, model, inputs, no_work):
        length = inputs["input_ids"].shape[1]
        with pytest.raises(
            ValueError, match=rf"attention_mask has shape \(1, {length - 1}\).*full length.*\(1, {length}\)"
        ):
            model(**inputs, attention_mask=torch.ones(1, length - 1))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 73, 73\).*must be 2D"):
            model(**inputs, attention_mask=torch.ones(1, 1, length, length))

    def test_a_mask_of_a_wrong_length_on_a_compressed_cache(self, model, inputs):
        with torch.no_grad():
            outputs = model(**inputs)
        length = inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(1, 30\).*\(1, {length + 1}\)"):
            model(
                input_ids=torch.tensor([[5]]),
                cache=cache_of(outputs),
                attention_mask=torch.ones(1, 30),
            )

    def test_labels_of_a_wrong_length(self, model, inputs, no_work):
        with pytest.raises(
            ValueError, match=r"labels have shape \(1, 9\); they must have the full length of the input"
        ):
            model(**inputs, labels=torch.zeros(1, 9, dtype=torch.long))

    def test_position_ids_of_a_wrong_shape(self, model, inputs):
        with pytest.raises(ValueError, match=r"position_ids must have shape \(batch, 73\), got \(1, 5\)"):
            model(**inputs, position_ids=torch.zeros(1, 5, dtype=torch.long))

    def test_stage_3_beyond_the_decoder(self, model, inputs, no_work):
        with pytest.raises(ValueError, match=r"inner_merge_layer is 5, but the decoder has 5 layers: choose 1 to 4"):
            model(**inputs, holitom_config=HoliTomConfig(inner_merge_layer=5))

    def test_features_encoded_without_importance(self, model, inputs):
        with torch.no_grad():
            features = model.get_video_features(inputs["pixel_values_videos"], holitom_config=IDENTITY)
        with pytest.raises(ValueError, match=r"encoded videos carry no importance: encode them with"):
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"video": features})

    def test_too_many_tokens_for_the_placeholders(self, model, inputs):
        settings = HoliTomConfig(
            retention_ratio=0.99, similarity_threshold=1.0, newline_position="row", inner_merge_layer=None
        )
        with pytest.raises(ValueError, match=r"has \d+ tokens, more than its 65 placeholders: lower the ratio"):
            model(**inputs, holitom_config=settings)

    def test_a_batch_of_chunk_size_zero(self, model, inputs, no_work):
        with pytest.raises(ValueError, match="vision_batch_size must be at least 1 or None, got 0"):
            model(**inputs, vision_batch_size=0)

    def test_both_or_neither_kind_of_input(self, model, inputs, no_work):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(pixel_values_videos=inputs["pixel_values_videos"])


def test_the_model_and_a_cache_stay_usable_after_an_error(model, inputs):
    with torch.no_grad():
        first = model(**inputs)
        expected = first.logits.clone()
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1)
        for bad in ({"attention_mask": mask[:, 1:]}, {"attention_mask": mask[None]}):
            with pytest.raises(ValueError, match="attention_mask"):
                model(input_ids=torch.tensor([[5]]), cache=cache_of(first), **bad)
        after = model(input_ids=torch.tensor([[5]]), cache=cache_of(first)).logits
        again = model(**inputs)
        fresh = model(input_ids=torch.tensor([[5]]), cache=cache_of(again)).logits
    assert torch.equal(again.logits, expected)
    assert torch.equal(after, fresh)
