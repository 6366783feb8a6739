"""Qwen3-VL from files to answers: its processors, its checkpoints and its pipeline."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    pipeline,
)
from transformers.video_utils import VideoMetadata

from holitom_hf import (
    HoliTomConfig,
    HoliTomQwen3VLConfig,
    HoliTomQwen3VLForConditionalGeneration,
    HoliTomQwen3VLModel,
    HoliTomQwen3VLProcessor,
    HoliTomQwen3VLVideoProcessor,
)
from holitom_hf.checkpoints.flattening import flat_package
from holitom_hf.models.qwen3_vl.backbone import BACKBONE
from holitom_hf.models.registry import backbone_of

from ..videos import numbered_frame, write_video
from .qwen import QWEN3_VL, config_for, make_processor


ON = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.3, inner_merge_layer=2)
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def processor() -> HoliTomQwen3VLProcessor:
    return make_processor(HoliTomQwen3VLProcessor, HoliTomQwen3VLVideoProcessor)


@pytest.fixture(scope="module")
def upstream() -> Qwen3VLProcessor:
    return make_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", n, size=(96, 64)) for n in (100, 12, 1)]


@pytest.fixture(scope="module")
def model(processor) -> HoliTomQwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    config = config_for(HoliTomQwen3VLConfig, QWEN3_VL, processor.tokenizer, holitom_config=ON)
    return HoliTomQwen3VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def sampled(outputs) -> list[list[int]]:
    return [[int(index) for index in metadata.frames_indices] for metadata in outputs["video_metadata"]]


class TestSampling:
    @pytest.mark.parametrize(
        ("asked", "indices"),
        [
            ({}, [0, 14, 28, 42, 57, 71, 85, 99]),  # 4 seconds, 2 a second
            ({"num_frames": 3}, [0, 50, 99]),
            ({"fps": 1}, [0, 33, 66, 99]),
            ({"num_frames": 1}, [0, 0]),  # a temporal patch needs two
            ({"do_sample_frames": False}, list(range(100))),
        ],
    )
    def test_frames_of_a_file(self, processor, clips, asked, indices):
        outputs = processor.video_processor(clips[0], **asked, return_metadata=True, return_tensors="pt")
        assert sampled(outputs) == [indices]
        assert outputs["video_grid_thw"][0, 0] == -(-len(indices) // 2)

    def test_a_processor_of_so_many_frames(self, clips):
        processor = make_processor(HoliTomQwen3VLProcessor, HoliTomQwen3VLVideoProcessor)
        processor.video_processor.num_frames = 6
        outputs = processor.video_processor(clips[:2], return_metadata=True, return_tensors="pt")
        assert [len(indices) for indices in sampled(outputs)] == [6, 6]
        assert sampled(processor.video_processor(clips[0], fps=1, return_metadata=True)) == [[0, 33, 66, 99]]

    def test_a_file_of_one_frame(self, processor, clips):
        outputs = processor(text="<|video_pad|>", videos=str(clips[2]), return_tensors="pt")
        assert outputs["video_grid_thw"][0, 0] == 1
        assert "<0.0 seconds>" in processor.decode(outputs["input_ids"][0])

    @pytest.mark.parametrize(
        ("asked", "match"),
        [
            ({"num_frames": 13}, "the video has 12 frames, fewer than the 13 asked for"),
            ({"num_frames": 0}, "num_frames must be at least 1"),
            ({"fps": 0}, "fps must be positive"),
            ({"fps": 1, "num_frames": 3}, "exclude each other"),
        ],
    )
    def test_bad_numbers_are_named(self, processor, clips, asked, match):
        with pytest.raises(ValueError, match=match):
            processor.video_processor(clips[1], **asked)

    @pytest.mark.parametrize("asked", [{}, {"fps": 5}, {"do_sample_frames": False}])
    def test_frames_in_memory_are_taken_as_upstream_takes_them(self, processor, upstream, asked):
        frames = np.stack([numbered_frame(n, 96, 64) for n in range(40)])
        inputs = {"videos": frames, "video_metadata": VideoMetadata(40, fps=20.0, frames_indices=list(range(40)))}
        ours = processor(text="<|video_pad|>", **inputs, **asked, return_tensors="pt")
        inputs["video_metadata"] = VideoMetadata(40, fps=20.0, frames_indices=list(range(40)))
        theirs = upstream(text="<|video_pad|>", **inputs, **asked, return_tensors="pt")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_decoded_files_are_preprocessed_as_upstream_does(self, processor, upstream, clips):
        ours = processor(text="a <|video_pad|>", videos=str(clips[0]), num_frames=6, return_tensors="pt")
        (frames,), (metadata,) = processor.video_processor.decode(clips[0], num_frames=6)
        theirs = upstream(
            text="a <|video_pad|>",
            videos=frames,
            video_metadata=metadata,
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestPrompts:
    def test_times_are_those_of_the_frames_that_were_taken(self, processor, clips):
        outputs = processor(text="<|video_pad|> What?", videos=str(clips[0]), num_frames=6, return_tensors="pt")
        text = processor.decode(outputs["input_ids"][0])
        indices = np.linspace(0, 99, 6).round() / 25
        for first, second in indices.reshape(3, 2):
            assert f"<{(first + second) / 2:.1f} seconds><|vision_start|>" in text
        frames, height, width = outputs["video_grid_thw"][0].tolist()
        assert frames == 3
        count = int((outputs["mm_token_type_ids"] == 2).sum())
        assert count == int((outputs["input_ids"] == processor.video_token_id).sum()) == frames * height * width // 4

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
        outputs = processor(text="<|video_pad|>", videos=video, num_frames=4, return_tensors="pt")
        assert outputs["video_grid_thw"][:, 0].tolist() == [2]

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
        assert outputs["video_grid_thw"][:, 0].tolist() == [2]
        assert outputs["mm_token_type_ids"].shape == outputs["input_ids"].shape

    def test_text_and_videos_must_match_in_number(self, processor, clips):
        with pytest.raises(ValueError, match="for 1 videos: put one into the text for each"):
            processor(text="<|video_pad|> <|video_pad|>", videos=str(clips[1]))

    def test_from_files_of_two_lengths_to_answers(self, model, processor, clips):
        texts = ["<|video_pad|> What?", "<|video_pad|> And this one here?"]
        inputs = processor(text=texts, videos=[str(clip) for clip in clips[:2]], padding=True, return_tensors="pt")
        outputs = model.generate(**inputs, **GREEDY)
        for row in range(2):
            alone = processor(text=texts[row], videos=str(clips[row]), return_tensors="pt")
            assert torch.equal(model.generate(**alone, **GREEDY)[0, -4:], outputs[row, -4:])


class TestCheckpoints:
    def test_a_round_trip(self, model, processor, clips, folder):
        loaded = HoliTomQwen3VLForConditionalGeneration.from_pretrained(folder)
        again = HoliTomQwen3VLProcessor.from_pretrained(folder)
        assert isinstance(again.video_processor, HoliTomQwen3VLVideoProcessor)
        assert loaded.config.holitom_config == model.config.holitom_config
        ours, theirs = (
            each(text="<|video_pad|>", videos=str(clips[0]), num_frames=4, return_tensors="pt")
            for each in (processor, again)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            assert torch.equal(model(**ours).logits, loaded(**theirs).logits)
        assert backbone_of(folder) is BACKBONE

    def test_upstream_reads_it_without_remote_code_and_the_other_way_round(self, model, folder, tmp_path):
        loaded, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        assert type(AutoModelForImageTextToText.from_pretrained(folder)) is Qwen3VLForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(folder)) is Qwen3VLProcessor
        loaded.save_pretrained(tmp_path)
        for ours in (HoliTomQwen3VLForConditionalGeneration, HoliTomQwen3VLModel):
            _, info = ours.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys"))
            assert info["unexpected_keys"] <= {"lm_head.weight"}

    def test_the_names_of_published_checkpoints_are_the_models_own(self, model):
        names = set(model.state_dict())
        assert {
            "model.visual.patch_embed.proj.weight",
            "model.visual.blocks.0.attn.qkv.weight",
            "model.visual.deepstack_merger_list.0.linear_fc1.weight",
            "model.visual.merger.norm.weight",
            "model.language_model.layers.0.self_attn.q_norm.weight",
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
        } <= names

    def test_tied_embeddings(self, processor, tmp_path):
        config = config_for(HoliTomQwen3VLConfig, QWEN3_VL, processor.tokenizer, tie_word_embeddings=True)
        config.holitom_config = ON
        model = HoliTomQwen3VLForConditionalGeneration(config)
        model.save_pretrained(tmp_path)
        loaded, info = HoliTomQwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight

    @pytest.mark.parametrize("kind", ["whole", "config only"])
    def test_remote_code_where_the_package_is_missing(self, model, processor, clips, folder, kind, tmp_path):
        if kind == "config only":
            loaded = HoliTomQwen3VLForConditionalGeneration.from_pretrained(folder)
            loaded.save_pretrained(tmp_path / "light", config_only=True)
            folder = tmp_path / "light"
            assert sum(file.stat().st_size for file in folder.iterdir()) < 220_000
        inputs = processor(text="<|video_pad|>", videos=str(clips[0]), num_frames=4, return_tensors="pt")
        wanted = model.generate(**inputs, **GREEDY)[0, -4:].tolist()
        code = f"""
import sys
sys.modules["holitom_hf"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder = {str(folder)!r}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="<|video_pad|>", videos={str(clips[0])!r}, num_frames=4, return_tensors="pt")
print(type(model).__name__, type(processor).__name__, type(processor.video_processor).__name__)
print(model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, -4:].tolist())
pipe = pipeline("video-text-to-text", model=folder, trust_remote_code=True)
print(type(pipe).__name__)
"""
        environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert run.stdout.splitlines() == [
            "HoliTomQwen3VLForConditionalGeneration HoliTomQwen3VLProcessor HoliTomQwen3VLVideoProcessor",
            str(wanted),
            "VideoTextToTextPipeline",
        ], run.stderr

    def test_it_carries_no_other_backbone_and_no_other_tower(self, folder):
        carried = {file.stem for file in folder.glob("*.py")}
        assert carried == set(flat_package(BACKBONE))
        assert not [name for name in carried if "llava" in name or "siglip" in name]


class TestPipeline:
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_chats_with_files(self, model, processor, folder, clips, batch_size, tmp_path):
        Qwen3VLForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path)
        make_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor).save_pretrained(tmp_path)
        pipe = pipeline(
            "video-text-to-text",
            model=HoliTomQwen3VLForConditionalGeneration.from_pretrained(tmp_path, holitom_config=ON),
            processor=HoliTomQwen3VLProcessor.from_pretrained(tmp_path),
        )
        assert type(pipe.model) is HoliTomQwen3VLForConditionalGeneration
        chats = [
            [{"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": text}]}]
            for clip, text in zip(clips[:2], ("What?", "And this one here?"))
        ]
        answers = pipe(chats, batch_size=batch_size, num_frames=4, return_full_text=False, generate_kwargs=GREEDY)
        for chat, answer in zip(chats, answers):
            inputs = processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_frames": 4},
            )
            tokens = model.generate(**inputs, **GREEDY)[0, -4:]
            assert answer[0]["generated_text"] == processor.decode(tokens, skip_special_tokens=True)
