"""The Qwen-VL families from files to answers: their processors, their checkpoints and their pipeline."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.video_utils import VideoMetadata

from holitom_hf import HoliTomProcessor, HoliTomQwen2_5_VLProcessor, HoliTomQwen3VLProcessor
from holitom_hf.checkpoints.flattening import flat_package
from holitom_hf.models.qwen_vl.limits import with_size
from holitom_hf.models.registry import backbone_of, backbones

from ..videos import numbered_frame, write_video
from .qwen import CHAT_TEMPLATE, FAMILIES, MERGE, ON, PATCH, QWEN2_5_VL, Family, config_for


GREEDY = {"do_sample": False, "max_new_tokens": 4}
qwen2_5_vl_only = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
timed_only = pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].is_timed], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def processor(family):
    return family.make_processor()


@pytest.fixture(scope="module")
def upstream(family):
    return family.make_upstream_processor()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", n, size=(96, 64)) for n in (100, 12, 1)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{n}.png" for n in range(6)]
    for number, file in enumerate(files):
        Image.fromarray(numbered_frame(number, 96, 64)).save(file)
    return [str(file) for file in files]


@pytest.fixture(scope="module")
def model(family, processor):
    return family.make_model(processor.tokenizer)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def sampled(outputs) -> list[list[int]]:
    return [[int(index) for index in metadata.frames_indices] for metadata in outputs["video_metadata"]]


def assert_upstreams_inputs(processor, upstream, **asked) -> None:
    """That an image and frames in memory become what upstream makes of them."""
    frames = np.stack([numbered_frame(n, 96, 64) for n in range(40)])
    ours, theirs = (
        each(
            text="<|image_pad|> and <|video_pad|>",
            images=[Image.fromarray(frames[1])],
            videos=frames,
            # One each: upstream writes into it.
            video_metadata=VideoMetadata(40, fps=20.0, frames_indices=list(range(40))),
            return_tensors="pt",
            **asked,
        )
        for each in (processor, upstream)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_whole(info: dict, unexpected: tuple[str, ...] = ()) -> None:
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert info["unexpected_keys"] <= set(unexpected)


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

    def test_a_processor_of_so_many_frames(self, family, clips):
        processor = family.make_processor()
        processor.video_processor.num_frames = 6
        outputs = processor.video_processor(clips[:2], return_metadata=True, return_tensors="pt")
        assert [len(indices) for indices in sampled(outputs)] == [6, 6]
        assert sampled(processor.video_processor(clips[0], fps=1, return_metadata=True)) == [[0, 33, 66, 99]]

    @pytest.mark.parametrize("total", [1, 2, 7, 40, 1001])
    def test_as_many_as_asked_both_ends_among_them(self, processor, total):
        metadata = VideoMetadata(total, fps=25.0)
        for number in range(1, min(total, 70) + 1):
            indices = processor.video_processor.sample_frames(metadata, num_frames=number).tolist()
            assert len(indices) == len(set(indices)) == number
            assert indices == sorted(indices)
            assert indices[0] == 0
            assert indices[-1] == total - 1 or number == 1

    def test_a_file_of_one_frame(self, processor, clips):
        outputs = processor(text="<|video_pad|>", videos=str(clips[2]), return_tensors="pt")
        assert outputs["video_grid_thw"][0, 0] == 1

    def test_image_files_are_frames_that_were_sampled_already(self, processor, pictures):
        outputs = processor.video_processor([[pictures]], do_sample_frames=False, return_metadata=True)
        assert sampled(outputs) == [list(range(6))]
        assert outputs["video_metadata"][0].sampled_fps == 2
        outputs = processor.video_processor([[pictures]], fps=4, do_sample_frames=False, return_metadata=True)
        assert outputs["video_metadata"][0].sampled_fps == 4

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
        assert_upstreams_inputs(processor, upstream, **asked)

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


class TestLimits:
    @pytest.mark.parametrize(
        "asked", [{"max_pixels": 512}, {"min_pixels": 40_000}, {"min_pixels": 64, "max_pixels": 900}]
    )
    @pytest.mark.parametrize("is_file", [True, False])
    def test_pixels_are_upstreams_size(self, family, processor, upstream, clips, asked, is_file):
        (frames,), (metadata,) = processor.video_processor.decode(clips[0], num_frames=4)
        size = {"shortest_edge": asked.get("min_pixels", 64), "longest_edge": asked.get("max_pixels", 40_000)}
        given = {"video_metadata": metadata, "do_sample_frames": False}
        theirs = upstream(text="a <|video_pad|>", videos=frames, **given, size=size, return_tensors="pt")
        ours = processor(
            text="a <|video_pad|>",
            videos=str(clips[0]) if is_file else frames,
            **({"num_frames": 4} if is_file else given),
            videos_kwargs=asked,
            return_tensors="pt",
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        frames, height, width = ours["video_grid_thw"][0].tolist()
        pixels = height * width * PATCH**2 * (1 if family.name == "Qwen2_5_VL" else 2 * frames)
        assert asked.get("min_pixels", 0) <= pixels <= asked.get("max_pixels", 1e9)
        alone = processor.video_processor(clips[0], num_frames=4, **asked, return_tensors="pt")
        assert torch.equal(alone["pixel_values_videos"], theirs["pixel_values_videos"])
        flat = processor(text="<|video_pad|>", videos=str(clips[0]), num_frames=4, **asked, return_tensors="pt")
        assert torch.equal(flat["pixel_values_videos"], theirs["pixel_values_videos"])

    def test_of_a_constructor_or_a_checkpoint(self, family, tmp_path):
        made = family.ours("VideoProcessor")(min_pixels=100, max_pixels=5000)
        assert dict(made.size) == {"shortest_edge": 100, "longest_edge": 5000}
        made.save_pretrained(tmp_path)
        loaded = family.ours("VideoProcessor").from_pretrained(tmp_path)
        assert dict(loaded.size) == {"shortest_edge": 100, "longest_edge": 5000}
        loaded = family.ours("VideoProcessor").from_pretrained(tmp_path, max_pixels=3000)
        assert dict(loaded.size) == {"shortest_edge": 100, "longest_edge": 3000}

    @pytest.mark.parametrize(
        ("asked", "size"),
        [
            ({"max_pixels": 10}, {"shortest_edge": 10, "longest_edge": 10}),
            ({"min_pixels": 90}, {"shortest_edge": 90, "longest_edge": 90}),
            ({"min_pixels": 30}, {"shortest_edge": 30, "longest_edge": 80}),
            (
                {"min_pixels": 30, "size": {"shortest_edge": 1, "longest_edge": 99}},
                {"shortest_edge": 30, "longest_edge": 99},
            ),
        ],
    )
    def test_the_one_that_is_not_given_gives_way(self, family, asked, size):
        found = with_size(asked | {"fps": 2}, {"shortest_edge": 20, "longest_edge": 80})
        assert found == {"fps": 2, "size": size}

    @pytest.mark.parametrize("asked", [{"max_pixels": 0}, {"min_pixels": -1}, {"min_pixels": 9, "max_pixels": 8}])
    def test_bad_ones_are_named(self, processor, clips, asked):
        with pytest.raises(ValueError, match="min_pixels and max_pixels must be positive, the first not above"):
            processor.video_processor(clips[0], **asked)

    @pytest.mark.parametrize(
        ("asked", "number"),
        [
            ({"max_frames": 4}, 4),
            ({"min_frames": 12}, 12),
            ({"fps": 1, "min_frames": 6}, 6),
            ({"fps": 25, "max_frames": 10}, 10),
        ],
    )
    def test_frames_of_a_call(self, processor, clips, asked, number):
        alone = processor.video_processor(clips[0], **asked, return_metadata=True)
        assert [len(indices) for indices in sampled(alone)] == [number]
        outputs = processor(text="<|video_pad|>", videos=str(clips[0]), **asked, return_tensors="pt")
        assert outputs["video_grid_thw"][0, 0] == number // 2
        nested = processor(text="<|video_pad|>", videos=str(clips[0]), videos_kwargs=asked, return_tensors="pt")
        assert nested["video_grid_thw"][0, 0] == number // 2


class TestPrompts:
    def test_there_is_a_placeholder_for_every_token(self, processor, clips):
        outputs = processor(text="<|video_pad|> What?", videos=str(clips[0]), num_frames=6, return_tensors="pt")
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
    def test_a_round_trip(self, family, model, processor, clips, folder):
        loaded = family.generation.from_pretrained(folder)
        again = family.ours("Processor").from_pretrained(folder)
        assert isinstance(again.video_processor, family.ours("VideoProcessor"))
        assert loaded.config.holitom_config == model.config.holitom_config
        ours, theirs = (
            each(text="<|video_pad|>", videos=str(clips[0]), num_frames=4, return_tensors="pt")
            for each in (processor, again)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            assert torch.equal(model(**ours).logits, loaded(**theirs).logits)
        assert backbone_of(folder) is backbones()[model.config.model_type]

    def test_upstream_reads_it_without_remote_code_and_the_other_way_round(self, family, model, folder, tmp_path):
        loaded, info = family.upstream.from_pretrained(folder, output_loading_info=True)
        assert_whole(info)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        assert type(AutoModelForImageTextToText.from_pretrained(folder)) is family.upstream
        assert type(AutoProcessor.from_pretrained(folder)) is family.upstream_processor
        loaded.save_pretrained(tmp_path)
        _, info = family.generation.from_pretrained(tmp_path, output_loading_info=True)
        assert_whole(info)
        _, info = family.ours("Model").from_pretrained(tmp_path, output_loading_info=True)
        assert_whole(info, unexpected=("lm_head.weight",))

    def test_another_familys_processor_is_refused_with_the_name_of_the_right_one(self, family, folder, tmp_path):
        right = family.ours("Processor")
        family.upstream.config_class(**family.values).save_pretrained(tmp_path)
        for other in {HoliTomProcessor, HoliTomQwen3VLProcessor, HoliTomQwen2_5_VLProcessor} - {right}:
            for checkpoint in (folder, tmp_path):  # ours and upstream's
                message = rf"^{other.__name__} is for .*; {checkpoint} is a .*: use {right.__name__}$"
                with pytest.raises(ValueError, match=message):
                    other.from_pretrained(checkpoint)

    def test_files_are_sampled_whatever_upstreams_processor_wrote(self, family, clips, tmp_path):
        family.make_upstream_processor().save_pretrained(tmp_path)
        for video_processor in (
            family.ours("Processor").from_pretrained(tmp_path).video_processor,
            family.ours("VideoProcessor").from_pretrained(tmp_path),
        ):
            assert type(video_processor) is family.ours("VideoProcessor")
            assert [len(indices) for indices in sampled(video_processor(clips[0], return_metadata=True))] == [8]

    def test_how_our_processor_samples_is_kept(self, family, clips, tmp_path):
        processor = family.make_processor()
        processor.video_processor.do_sample_frames = False
        processor.save_pretrained(tmp_path)
        for loaded in (
            family.ours("VideoProcessor").from_pretrained(tmp_path),
            family.ours("Processor").from_pretrained(tmp_path).video_processor,
        ):
            assert sampled(loaded(clips[1], return_metadata=True)) == [list(range(12))]

    def test_tied_embeddings(self, family, processor, tmp_path):
        config = config_for(family.ours("Config"), family.values, processor.tokenizer, tie_word_embeddings=True)
        config.holitom_config = ON
        family.generation(config).save_pretrained(tmp_path)
        loaded, info = family.generation.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight

    @pytest.mark.parametrize("kind", ["whole", "config only"])
    def test_remote_code_where_the_package_is_missing(self, family, model, processor, clips, folder, kind, tmp_path):
        if kind == "config only":
            loaded = family.generation.from_pretrained(folder)
            loaded.save_pretrained(tmp_path / "light", config_only=True)
            folder = tmp_path / "light"
            # Experts and layers of linear attention are code of two kinds.
            bound = 223_000 if family.name == "Qwen3_5Moe" else 220_000
            assert sum(file.stat().st_size for file in folder.iterdir()) < bound
        assert_remote_code_answers(family, model, processor, clips[0], folder, tmp_path)

    def test_it_carries_no_other_backbone_and_no_other_tower(self, model, folder):
        carried = {file.stem for file in folder.glob("*.py")}
        assert carried == set(flat_package(backbones()[model.config.model_type]))
        assert not [name for name in carried if "llava" in name or "siglip" in name]


def assert_remote_code_answers(family: Family, model, processor, clip: Path, folder: Path, tmp_path: Path) -> None:
    """That a checkpoint answers as `model` does where the package is missing, by its own code."""
    inputs = processor(text="<|video_pad|>", videos=str(clip), num_frames=4, return_tensors="pt")
    wanted = model.generate(**inputs, **GREEDY)[0, -4:].tolist()
    code = f"""
import sys
sys.modules["holitom_hf"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder = {str(folder)!r}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
inputs = processor(text="<|video_pad|>", videos={str(clip)!r}, num_frames=4, return_tensors="pt")
print(type(model).__name__, type(processor).__name__, type(processor.video_processor).__name__)
print(*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"])
print(model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, -4:].tolist())
pipe = pipeline("video-text-to-text", model=folder, trust_remote_code=True)
print(type(pipe).__name__)
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    roles = ("ForConditionalGeneration", "Processor", "VideoProcessor")
    assert run.stdout.splitlines() == [
        " ".join(f"HoliTom{family.name}{role}" for role in roles),
        "",
        str(wanted),
        "VideoTextToTextPipeline",
    ], run.stderr


class TestPipeline:
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_chats_with_files(self, family, model, processor, folder, clips, batch_size, tmp_path):
        family.upstream.from_pretrained(folder).save_pretrained(tmp_path)
        family.make_upstream_processor().save_pretrained(tmp_path)
        pipe = pipeline(
            "video-text-to-text",
            model=family.generation.from_pretrained(tmp_path, holitom_config=ON),
            processor=family.ours("Processor").from_pretrained(tmp_path),
        )
        assert type(pipe.model) is family.generation
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


@timed_only
class TestTimes:
    def test_times_are_those_of_the_frames_that_were_taken(self, processor, clips):
        outputs = processor(text="<|video_pad|> What?", videos=str(clips[0]), num_frames=6, return_tensors="pt")
        text = processor.decode(outputs["input_ids"][0])
        indices = np.linspace(0, 99, 6).round() / 25
        for first, second in indices.reshape(3, 2):
            assert f"<{(first + second) / 2:.1f} seconds><|vision_start|>" in text

    def test_the_time_of_a_file_of_one_frame(self, processor, clips):
        outputs = processor(text="<|video_pad|>", videos=str(clips[2]), return_tensors="pt")
        assert "<0.0 seconds>" in processor.decode(outputs["input_ids"][0])

    def test_the_times_of_image_files(self, processor, pictures):
        outputs = processor(text="<|video_pad|>", videos=[[pictures]], do_sample_frames=False, return_tensors="pt")
        text = processor.decode(outputs["input_ids"][0])
        assert [f"<{seconds} seconds>" in text for seconds in (0.2, 1.2, 2.2)] == [True] * 3

    def test_the_names_of_published_checkpoints_are_the_models_own(self, family, model):
        names = set(model.state_dict())
        assert {
            "model.visual.patch_embed.proj.weight",
            "model.visual.blocks.0.attn.qkv.weight",
            "model.visual.merger.norm.weight",
            "model.language_model.layers.1.self_attn.q_norm.weight",
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
        } <= names
        if family.has_deepstack:
            assert "model.visual.deepstack_merger_list.0.linear_fc1.weight" in names
        if family.is_hybrid:
            assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in names


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].has_experts], indirect=True)
class TestExperts:
    def test_experts_load_in_the_layouts_of_checkpoints(self, family, model, tmp_path):
        """Qwen3-VL-MoE's are transposed on the Hub; others may have every expert's matrices for themselves."""
        model.config.save_pretrained(tmp_path)
        weights = {}
        for name, value in model.state_dict().items():
            if not name.endswith(("gate_up_proj", "experts.down_proj")):
                weights[name] = value.clone()
            elif family.has_deepstack:
                weights[name] = value.mT.contiguous()
            else:
                parts = {"gate_proj": 0, "up_proj": 1} if name.endswith("gate_up_proj") else {"down_proj": 0}
                for number, expert in enumerate(value):
                    for part, place in parts.items():
                        matrix = expert.chunk(len(parts))[place].clone()
                        weights[f"{name.rpartition('.')[0]}.{number}.{part}.weight"] = matrix
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for cls in (family.generation, family.upstream):
            loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
            assert_whole(info)
            assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        loaded, info = family.ours("Model").from_pretrained(tmp_path, output_loading_info=True)
        assert_whole(info, unexpected=("lm_head.weight",))
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.model.state_dict().items())


def write_as_published(folder: Path, model, processor) -> None:
    """
    Qwen2.5-VL as it is on the Hub, where transformers 4 wrote it: the decoder's settings beside all others, weights
    under their old names, one file for the processors of images and videos.
    """
    values, ids = QWEN2_5_VL["text_config"], [name for name in QWEN2_5_VL if name.endswith("_token_id")]
    config = {name: value for name, value in values.items() if name != "rope_parameters"} | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_theta": values["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": values["rope_parameters"]["mrope_section"]},
        "vocab_size": model.config.text_config.vocab_size,
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "vision_config": QWEN2_5_VL["vision_config"] | {"in_chans": 3, "spatial_patch_size": PATCH},
    }
    config |= {name: getattr(model.config, name) for name in ids}
    preprocessor = {
        "min_pixels": 64,
        "max_pixels": 16 * 32,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    processor.tokenizer.save_pretrained(folder)
    for name, content in {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }.items():
        (folder / name).write_text(json.dumps(content))
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.clone()
        for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@qwen2_5_vl_only
class TestQwen25VL:
    @pytest.fixture(scope="class")
    def published(self, model, processor, tmp_path_factory):
        folder = tmp_path_factory.mktemp("published")
        write_as_published(folder, model, processor)
        return folder

    @pytest.mark.parametrize(
        ("total", "fps", "asked", "number"),
        [
            (100, 25.0, {}, 8),
            (12, 25.0, {}, 4),  # not fewer
            (3, 25.0, {}, 2),  # pairs
            (5, 1.0, {}, 4),
            (299, 30000 / 1001, {}, 18),
            (1001, 30.0, {}, 66),
            (100_000, 25.0, {}, 768),  # not more
            (100, 25.0, {"fps": 1.25}, 4),
        ],
    )
    def test_by_rate_as_many_frames_as_qwens_own_tools_take(self, processor, total, fps, asked, number):
        """Recorded from `smart_nframes` of qwen-vl-utils 0.0.14, which then takes them evenly, both ends included."""
        indices = processor.video_processor.sample_frames(VideoMetadata(total, fps=fps), **asked)
        assert indices.tolist() == [round(i * (total - 1) / (number - 1)) for i in range(number)]

    @pytest.mark.parametrize(
        ("clip", "asked", "seconds"),
        [
            (0, {}, 1.0),  # two frames a second
            (0, {"num_frames": 10}, 0.8),  # 5 pairs in 4 seconds
            (0, {"num_frames": 3}, 2 * 4 / 3),
            (0, {"num_frames": 1}, 4.0),  # the one frame twice
            (0, {"fps": 4}, 0.5),
            (0, {"do_sample_frames": False}, 2 / 25),
            (1, {}, 0.24),  # the fewest frames, 4 in 0.48 seconds
            (2, {}, 1 / 25),
        ],
    )
    def test_seconds_are_those_of_the_frames_that_were_taken(self, processor, clips, clip, asked, seconds):
        outputs = processor(text="<|video_pad|>", videos=str(clips[clip]), **asked, return_tensors="pt")
        torch.testing.assert_close(outputs["second_per_grid_ts"], torch.tensor([seconds]))

    def test_seconds_of_image_files(self, processor, pictures):
        outputs = processor(text="<|video_pad|>", videos=[[pictures]], return_tensors="pt")
        assert outputs["second_per_grid_ts"].tolist() == [1.0]
        outputs = processor(text="<|video_pad|>", videos=[[pictures]], fps=4, return_tensors="pt")
        assert outputs["second_per_grid_ts"].tolist() == [0.5]

    @pytest.mark.parametrize("asked", [{"fps": 3}, {"num_frames": 7}, {"num_frames": 6}])
    def test_frames_in_memory_are_sampled_by_upstream(self, processor, upstream, asked):
        assert_upstreams_inputs(processor, upstream, **asked)
        assert_upstreams_inputs(processor, upstream, do_sample_frames=True, **asked)

    @pytest.mark.parametrize("role", ["ForConditionalGeneration", "Model"])
    @pytest.mark.parametrize("is_tied", [False, True])
    def test_a_published_checkpoint_loads_whole(self, family, processor, role, is_tied, tmp_path):
        config = config_for(family.ours("Config"), QWEN2_5_VL, processor.tokenizer, tie_word_embeddings=is_tied)
        config.holitom_config = ON
        model = family.generation(config)
        write_as_published(tmp_path, model, processor)
        loaded, info = family.ours(role).from_pretrained(tmp_path, holitom_config=ON, output_loading_info=True)
        assert_whole(info, unexpected=("lm_head.weight",) if role == "Model" else ())
        wanted = (model if role == "ForConditionalGeneration" else model.model).state_dict()
        assert loaded.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
        assert backbone_of(tmp_path) is backbones()["qwen2_5_vl"]

    def test_a_published_processor_loads(self, family, processor, clips, published):
        loaded = family.ours("Processor").from_pretrained(published)
        assert type(loaded) is family.ours("Processor")
        assert type(loaded.video_processor) is family.ours("VideoProcessor")
        size = {"shortest_edge": 64, "longest_edge": 16 * 32}
        assert dict(loaded.image_processor.size) == dict(loaded.video_processor.size) == size
        assert loaded.chat_template == CHAT_TEMPLATE
        ours, theirs = (
            each(text="<|video_pad|>", videos=str(clips[0]), return_tensors="pt") for each in (processor, loaded)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        alone = family.ours("VideoProcessor").from_pretrained(published)
        assert torch.equal(alone(clips[0], return_tensors="pt")["pixel_values_videos"], ours["pixel_values_videos"])

    @pytest.mark.parametrize("kind", ["code beside it", "saved again", "config only"])
    def test_remote_code_over_published_weights(self, family, model, processor, clips, published, kind, tmp_path):
        folder = tmp_path / "checkpoint"
        loaded = family.generation.from_pretrained(published, holitom_config=ON)
        if kind == "code beside it":
            folder.mkdir()
            (folder / "model.safetensors").symlink_to(published / "model.safetensors")
            loaded.config.save_pretrained(folder)
        else:
            loaded.save_pretrained(folder, config_only=kind == "config only")
        if kind != "config only":
            family.ours("Processor").from_pretrained(published).save_pretrained(folder)
        assert_remote_code_answers(family, model, processor, clips[0], folder, tmp_path)
