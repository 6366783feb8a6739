import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

from holitom_hf import HoliTomProcessor, HoliTomVideoProcessor
from holitom_hf.bundled.tiny_model import CHAT_TEMPLATE, tiny_model, tiny_processor

from ..videos import write_video


TOKENS_PER_FRAME = 16


@pytest.fixture(scope="module")
def processor() -> HoliTomProcessor:
    return tiny_processor(side=32, patch=4, num_frames=32)


@pytest.fixture(scope="module")
def upstream(processor) -> LlavaOnevisionProcessor:
    """Upstream's processor with the same parts."""
    return LlavaOnevisionProcessor(
        processor.image_processor,
        processor.tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", n, size=(96, 64)) for n in (40, 12, 1)]


def sampled(outputs) -> list[list[int]]:
    return [list(metadata.frames_indices) for metadata in outputs["video_metadata"]]


class TestSampling:
    def test_32_frames_with_both_ends_by_default(self, processor, clips):
        outputs = processor.video_processor(clips[0], return_metadata=True, return_tensors="pt")
        assert outputs["pixel_values_videos"].shape == (1, 32, 3, 32, 32)
        assert outputs["pixel_values_videos"].is_contiguous()
        assert sampled(outputs) == [np.linspace(0, 39, 32, dtype=int).tolist()]

    def test_a_number_of_frames_or_a_rate_may_be_asked_for(self, processor, clips):
        outputs = processor.video_processor(clips[0], num_frames=5, return_metadata=True)
        assert sampled(outputs) == [[0, 9, 19, 29, 39]]
        outputs = processor.video_processor(clips[0], fps=5, return_metadata=True)  # 40 frames at 25 a second
        assert sampled(outputs) == [[0, 5, 10, 15, 20, 25, 30, 35]]

    def test_a_shorter_video_gives_all_its_frames_unless_more_are_asked_for(self, processor, clips):
        outputs = processor.video_processor(clips[1], return_metadata=True)
        assert sampled(outputs) == [list(range(12))]
        assert processor.video_processor(clips[2], return_tensors="pt")["pixel_values_videos"].shape[1] == 1
        with pytest.raises(
            ValueError, match=r"the video has 12 frames, fewer than the 13 asked for: lower num_frames"
        ):
            processor.video_processor(clips[1], num_frames=13)

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"num_frames": 4, "fps": 1}, "exclude each other"),
            ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
            ({"fps": 0}, "fps must be positive, got 0"),
        ],
    )
    def test_bad_numbers_are_named(self, processor, clips, kwargs, match):
        with pytest.raises(ValueError, match=match):
            processor.video_processor(clips[0], **kwargs)

    def test_every_frame_is_read_if_asked(self, processor, clips, tmp_path):
        outputs = processor.video_processor(clips[0], do_sample_frames=False, return_tensors="pt")
        assert outputs["pixel_values_videos"].shape[1] == 40
        asking = copy.deepcopy(processor)
        asking.video_processor.do_sample_frames = False
        asking.save_pretrained(tmp_path)
        loaded = HoliTomProcessor.from_pretrained(tmp_path).video_processor
        assert loaded(clips[0], return_tensors="pt")["pixel_values_videos"].shape[1] == 40


class TestFrames:
    """Arrays, tensors and images pass as they do upstream."""

    @pytest.mark.parametrize("kind", ["array", "tensor", "images", "list of arrays", "batch"])
    def test_frames_in_memory_are_taken_as_upstream_takes_them(self, processor, upstream, kind):
        frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
        videos = {
            "array": frames,
            "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
            "images": [Image.fromarray(frame) for frame in frames],
            "list of arrays": [frames, frames[::-1].copy()],
            "batch": np.stack([frames, frames]),
        }[kind]
        text = "<video> <video>" if kind in ("list of arrays", "batch") else "<video>"
        ours = processor(text=text, videos=videos, return_tensors="pt")
        theirs = upstream(text=text, videos=videos, return_tensors="pt")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_decoded_files_are_preprocessed_as_upstream_does(self, processor, upstream, clips):
        frames, _ = processor.video_processor.decode([clips[1]])
        ours = processor(text="<video>", videos=str(clips[1]), return_tensors="pt")
        theirs = upstream(text="<video>", videos=frames, return_tensors="pt")
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


class TestPrompts:
    def test_a_placeholder_is_expanded_to_the_full_length(self, processor, clips):
        outputs = processor(text="What is in <video>?", videos=str(clips[0]), num_frames=6, return_tensors="pt")
        assert int((outputs["input_ids"] == processor.video_token_id).sum()) == 6 * TOKENS_PER_FRAME + 1
        assert outputs["attention_mask"].shape == outputs["input_ids"].shape

    def test_videos_of_different_length_come_as_a_list(self, processor, clips):
        outputs = processor(
            text=["<video> one", "<video> <video>"],
            videos=[str(clips[1]), str(clips[2]), clips[1].read_bytes()],
            padding=True,
            return_tensors="pt",
        )
        assert [len(video) for video in outputs["pixel_values_videos"]] == [12, 1, 12]
        counts = (outputs["input_ids"] == processor.video_token_id).sum(1).tolist()
        assert counts == [12 * TOKENS_PER_FRAME + 1, 13 * TOKENS_PER_FRAME + 2]
        assert outputs.to(torch.bfloat16)["pixel_values_videos"][0].dtype == torch.bfloat16

    @pytest.mark.parametrize("how", ["path", "pathlib", "bytes", "file", "nested"])
    def test_a_video_may_be_given_in_every_way(self, processor, clips, how):
        data = clips[1].read_bytes()
        video = {
            "path": str(clips[1]),
            "pathlib": clips[1],
            "bytes": data,
            "file": io.BytesIO(data),
            "nested": [[str(clips[1])]],
        }[how]
        outputs = processor(text="<video>", videos=video, num_frames=3, return_tensors="pt")
        assert outputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)

    def test_a_conversation_with_a_file_is_one_call(self, processor, clips):
        content = [{"type": "video", "path": str(clips[0])}, {"type": "text", "text": "What happens?"}]
        outputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": 4},
        )
        assert outputs["pixel_values_videos"].shape == (1, 4, 3, 32, 32)
        text = processor.decode(outputs["input_ids"][0][outputs["input_ids"][0] != processor.video_token_id])
        assert text == "<|im_start|>user \nWhat happens?<|im_end|><|im_start|>assistant\n"

    def test_text_and_videos_must_match_in_number(self, processor, clips):
        with pytest.raises(ValueError, match="the text has 2 <video> for 1 videos: put one into the text for each"):
            processor(text="<video> <video>", videos=str(clips[1]))


class TestSaving:
    def test_a_round_trip_keeps_everything(self, processor, clips, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = HoliTomProcessor.from_pretrained(tmp_path)
        assert isinstance(loaded.video_processor, HoliTomVideoProcessor)
        ours = processor(text="a <video>", videos=str(clips[0]), num_frames=3, return_tensors="pt")
        again = loaded(text="a <video>", videos=str(clips[0]), num_frames=3, return_tensors="pt")
        assert all(torch.equal(ours[name], again[name]) for name in ours)
        assert loaded.chat_template == processor.chat_template

    def test_without_remote_code_the_same_files_are_upstreams(self, processor, upstream, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is LlavaOnevisionProcessor
        assert type(loaded.video_processor) is LlavaOnevisionVideoProcessor
        frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
        ours = loaded(text="<video>", videos=frames, return_tensors="pt")
        theirs = upstream(text="<video>", videos=frames, return_tensors="pt")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_an_upstream_checkpoint_gets_our_video_processor_with_its_settings(self, upstream, clips, tmp_path):
        upstream.video_processor.image_mean = [0.1, 0.2, 0.3]
        upstream.save_pretrained(tmp_path)
        loaded = HoliTomProcessor.from_pretrained(tmp_path)
        upstream.video_processor.image_mean = loaded.image_processor.image_mean
        assert isinstance(loaded.video_processor, HoliTomVideoProcessor)
        assert list(loaded.video_processor.image_mean) == [0.1, 0.2, 0.3]
        assert loaded(text="<video>", videos=str(clips[1]), return_tensors="pt")["pixel_values_videos"].shape[1] == 12


def test_from_a_file_to_an_answer(clips):
    processor = tiny_processor()
    model = tiny_model(processor.tokenizer)
    inputs = processor(
        text=["<video> What?", "<video> And this?"],
        videos=[str(clips[0]), str(clips[1])],
        padding=True,
        return_tensors="pt",
    )
    outputs = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(outputs[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    single = processor(text="<video> What?", videos=str(clips[0]), return_tensors="pt")
    alone = model.generate(**single, max_new_tokens=4, do_sample=False)
    assert torch.equal(outputs[0, inputs["input_ids"].shape[1] :], alone[0, single["input_ids"].shape[1] :])


def test_a_checkpoint_keeps_its_number_of_frames(clips, tmp_path):
    tiny_processor(side=32, patch=4, num_frames=6).save_pretrained(tmp_path)
    loaded = HoliTomProcessor.from_pretrained(tmp_path)
    assert loaded.video_processor(clips[0], return_tensors="pt")["pixel_values_videos"].shape[1] == 6
    silent = HoliTomVideoProcessor.from_dict(LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}).to_dict())
    assert silent.num_frames == 32
