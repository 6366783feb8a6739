"""How the bundled model is trained: labels that are true, steps that can be stopped and taken up again."""

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from holitom_hf import (
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomProcessor,
    HoliTomQwen3VLForConditionalGeneration,
)
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import uniform_times
from holitom_hf.bundled.scenes import COLORS, HELD_OUT, SHAPES, Clip, Scene, Shape, random_clip
from holitom_hf.bundled.training import trainer as trainer_module
from holitom_hf.bundled.training.batches import (
    TRAIN_SEEDS,
    PairedClips,
    PairedFrames,
    QuestionedClips,
    SingleFrames,
    told_frames,
)
from holitom_hf.bundled.training.labels import TRENDS, patch_labels, places_of, trend_labels
from holitom_hf.bundled.training.llava_onevision import LlavaOnevisionTrainer as Trainer
from holitom_hf.bundled.training.qwen3_vl import SECONDS_PER_FRAME, Qwen3VLTrainer


TIMES = uniform_times(8)


def moving(direction, end, behavior="moves", interval=(0.0, 1.0), sizes=(0.12, 0.12)):
    knots = np.array([[0.0, 0.5, 0.5, sizes[0]], [1.0, *end, sizes[1]]])
    return Clip([Scene("dots", (0.0, 1.0), 0)], [Shape("red", "square", behavior, 0, interval, knots, direction)])


def labels_of(clip, grid=7):
    masks = clip.masks(TIMES, 112)
    return patch_labels(clip, TIMES, masks, grid)


@pytest.mark.parametrize("grid", [7, 14])
def test_patch_labels_say_what_lies_where(grid):
    labels = labels_of(moving("right", (0.8, 0.5)), grid)
    middle = (grid // 2) * grid + grid // 2
    assert labels.colors[0, middle] == list(COLORS).index("red") + 1
    assert labels.shapes[0, middle] == SHAPES.index("square") + 1
    assert labels.colors[-1, middle - grid // 3] == 0
    assert ((labels.index >= 0) == (labels.colors > 0)).all()
    np.testing.assert_allclose(labels.geometry[0, middle], (0.51875, 0.5, 0.12), atol=1e-5)
    assert labels.covered.shape == (8, grid * grid, 64)
    assert labels.covered[0, middle].min() > 0.9
    assert labels.covered[0, 0].max() == 0
    assert (labels.present.sum(1) == 1).all()


@pytest.mark.parametrize(
    ("clip", "trend"),
    [
        (moving("right", (0.85, 0.5)), "right"),
        (moving("left", (0.15, 0.5)), "left"),
        (moving("up", (0.5, 0.15)), "up"),
        (moving("down", (0.5, 0.85)), "down"),
        (moving(None, (0.5, 0.5), "grows", sizes=(0.07, 0.15)), "larger"),
        (moving(None, (0.5, 0.5), "shrinks", sizes=(0.15, 0.07)), "smaller"),
        (moving(None, (0.5, 0.5), "stays"), "still"),
    ],
)
def test_trends_are_told_from_the_past_only(clip, trend):
    labels = labels_of(clip)
    trends, rank, scene = trend_labels(clip, TIMES, labels.index)
    on_shape = labels.index >= 0
    assert (trends[0][on_shape[0]] == -100).all()
    assert (trends[-1][on_shape[-1]] == TRENDS.index(trend)).all()
    assert (trends[~on_shape] == 0).all()
    assert (rank[on_shape] == 0).all()
    assert (scene == 0).all()
    short, _, _ = trend_labels(clip, TIMES[:5], labels.index[:5])
    assert (short == trends[:5]).all()


def test_where_to_look():
    labels = labels_of(moving("right", (0.85, 0.5)))
    everywhere, later = (places_of("red square", kind, labels) for kind in ("color", "motion"))
    assert (everywhere == (labels.colors > 0)).all()
    assert not later[:4].any()
    assert (later[4:] == everywhere[4:]).all()
    assert (places_of("dots", "scene order", labels) == ~everywhere).all()
    assert not places_of("waves", "scene order", labels).any()


def test_clips_without_shapes_have_labels_too():
    labels = labels_of(Clip([Scene("waves", (0.0, 1.0), 0)], []))
    assert not labels.colors.any()
    assert (labels.index == -1).all()
    for part in trend_labels(Clip([Scene("waves", (0.0, 1.0), 0)], []), TIMES, labels.index)[:1]:
        assert (part == 0).all()


def test_batches_are_the_same_for_the_same_step_and_differ_between_ranks():
    first, again = (QuestionedClips(0, 100).draw(7) for _ in range(2))
    other = QuestionedClips(0, 100, rank=1).draw(7)
    assert (first.frames == again.frames).all()
    assert first.questions == again.questions
    assert first.frames.shape[1:] == other.frames.shape[1:]
    assert not np.array_equal(first.frames, other.frames)
    assert {len(asked) for asked in first.questions} == {10}


def test_layouts_are_many_and_begin_with_few_frames():
    layouts = [QuestionedClips(0, 1000).layout(step) for step in range(1000)]
    assert {frames for layout, frames, _ in layouts if layout == "video"} == {1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32}
    assert {frames for layout, frames, _ in layouts if layout == "images"} == {1, 2, 3, 4}
    assert np.mean([frames for _, frames, _ in layouts[:100]]) < 0.6 * np.mean([f for _, f, _ in layouts[500:]])
    assert 80 < sum(stretch != 1 for *_, stretch in layouts) < 180


def test_nothing_held_out_is_trained_on():
    for step in range(10):
        random = np.random.default_rng((TRAIN_SEEDS, 0, step, 0))
        assert not {(s.color, s.shape) for s in random_clip(random).shapes} & HELD_OUT


class SmallPairs:
    """Datasets of the small Qwen3-VL's trainer."""

    def frames(self):
        return PairedFrames(4, self.step)

    def clips(self):
        return PairedClips(self.step, self.answer_steps, num_tokens=200, num_questions=3)


@pytest.fixture
def small_batches(monkeypatch):
    def single_frames(size, start, rank):
        return SingleFrames(4, start, rank)

    def questioned_clips(start, num_steps, rank):
        return QuestionedClips(start, num_steps, rank, num_tokens=200, num_questions=3)

    monkeypatch.setattr(trainer_module, "SingleFrames", single_frames)
    monkeypatch.setattr(trainer_module, "QuestionedClips", questioned_clips)
    for name in ("frames", "clips"):
        monkeypatch.setattr(Qwen3VLTrainer, name, getattr(SmallPairs, name))
    monkeypatch.setattr(trainer_module.Trainer, "evaluate", lambda self, num_questions: {"accuracy": 0.0})
    monkeypatch.setattr(trainer_module, "_loader", iter)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, small_batches, monkeypatch):
    monkeypatch.setattr(trainer_module, "SAVE_EVERY", 2)

    def weights(folder, *stops):
        for stop in stops:
            trainer = Trainer(tmp_path / folder, 4, 4, "cpu")
            trainer.load()
            monkeypatch.setattr(trainer, "save_model", lambda: None)
            if trainer.phase == "vision":
                trainer.train_vision(stop_at=stop)
            if trainer.phase == "answers":
                trainer.train_answers(stop_at=stop - 4)
        return trainer.average

    whole, parts = weights("whole", 6), weights("parts", 2, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_accuracy_is_measured_on_the_averaged_weights(tmp_path):
    trainer = Trainer(tmp_path, 1, 1, "cpu")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    scores = trainer.evaluate(9)
    assert 0 <= scores["accuracy"] <= 1
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    trainer.average["lm_head.weight"] = trainer.average["lm_head.weight"] * float("nan")
    assert trainer.evaluate(9)["accuracy"] == 0


def test_loss_falls_and_the_model_is_a_checkpoint(tmp_path, small_batches):
    from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration

    trainer = Trainer(tmp_path, 12, 2, "cpu")
    losses = []
    trainer._log = lambda every, values: losses.append(values["loss"])
    trainer.train_vision()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    trainer.train_answers()
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trainer.average[name].to(torch.bfloat16), rtol=0, atol=0)
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 12 * 2**20


def test_looking_is_measured_as_the_decoder_attends(tmp_path):
    trainer = Trainer(tmp_path, 1, 1, "cpu")
    batches = QuestionedClips(0, 100, num_tokens=300, num_questions=3)
    batch = next(b for b in map(batches.draw, range(60, 100)) if b.layout == "video" and b.frames.shape[1] == 4)
    batch.stretch = 1.0
    measured = trainer.look_loss(batch, trainer.answer_logits(batch))

    model, tokenizer = trainer.model, trainer.processor.tokenizer
    model.set_attn_implementation("eager")
    prefix = trainer.prefix(batch)
    losses = []
    for clip, (labels, asked) in enumerate(zip(batch.labels, batch.questions)):
        for question in asked:
            ids = tokenizer(f"\n{question.text}<|im_end|><|im_start|>assistant\n", return_tensors="pt")["input_ids"]
            embeds = torch.cat([prefix.embeds[clip : clip + 1], model.get_input_embeddings()(ids)], 1)
            attentions = model.model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
            rows = attentions[trainer_module.LOOK_LAYER][0, :, -1, prefix.visual]
            rows = rows / rows.sum(-1, keepdim=True)
            if question.type == "existence" and not question.about:
                losses += [-row[-1].log() for row in rows]
            for row, name in zip(rows, np.repeat((question.about * 2)[:2], 2) if question.about else ()):
                on_shape = torch.from_numpy(np.append(places_of(name, question.type, labels), False))
                losses.append(-row[on_shape].sum().log())
    assert len(losses) >= 3
    torch.testing.assert_close(measured, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_packed_questions_are_answered_as_single_ones(tmp_path):
    trainer = Trainer(tmp_path, 1, 1, "cpu")
    batches = QuestionedClips(0, 100, num_tokens=300, num_questions=3)
    batch = next(b for b in map(batches.draw, range(60, 100)) if b.layout == "video" and b.frames.shape[1] == 4)
    batch.stretch = 1.0
    together = trainer.answer_logits(batch)
    pixels = trainer.pixels(batch.frames[1])[None]
    for number, question in enumerate(batch.questions[1]):
        video = "<video>" * (4 * 49 + 1)
        text = f"<|im_start|>user {video}\n{question.text}<|im_end|><|im_start|>assistant\n{question.answer}<|im_end|>"
        inputs = trainer.processor.tokenizer(text, return_tensors="pt")
        plain = {"outer_method": "none", "inner_method": "none"}
        logits = trainer.model(**inputs, pixel_values_videos=pixels, holitom_config=plain).logits[0]
        own = together.row == len(batch.questions[0]) + number
        torch.testing.assert_close(together.logits[own], logits[-own.sum() - 1 : -1], rtol=1e-3, atol=1e-4)
        assert together.labels[own].tolist() == inputs["input_ids"][0, -own.sum() :].tolist()


class TestQwen3VL:
    """The small Qwen3-VL's trainer, which starts from the bundled model."""

    @pytest.fixture(scope="class")
    def trainer(self, tmp_path_factory):
        return Qwen3VLTrainer(tmp_path_factory.mktemp("qwen3_vl"), 3, 2, "cpu")

    @pytest.mark.parametrize("layout", ["video", "images"])
    def test_questions_are_answered_as_by_the_processor_and_the_model(self, trainer, layout):
        batches = PairedClips(0, 100, num_tokens=300, num_questions=3)
        batch = next(b for b in map(batches.draw, range(100)) if b.layout == layout and b.frames.shape[1] == 3)
        together = trainer.answer_logits(batch)
        processor, frames = trainer.processor, torch.from_numpy(batch.frames[1]).permute(0, 3, 1, 2)
        media = {"images": list(frames)}
        if layout == "video":
            # The processor repeats an odd video's last frame; only its time is made up by us then.
            fps = 1 / (SECONDS_PER_FRAME * batch.stretch)
            metadata = VideoMetadata(total_num_frames=3, fps=fps, frames_indices=[0, 1, 2, 3])
            media = {"videos": [torch.cat([frames, frames[-1:]])], "video_metadata": [metadata]}
            media["do_sample_frames"] = False
        for number, question in enumerate(batch.questions[1]):
            kinds = [{"type": "video"}] if layout == "video" else [{"type": "image"}] * 3
            messages = [{"role": "user", "content": [*kinds, {"type": "text", "text": question.text}]}]
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(text=text + question.answer + "<|im_end|>", return_tensors="pt", **media)
            plain = {"outer_method": "none", "inner_method": "none"}
            with torch.no_grad():
                logits = trainer.model(**inputs, holitom_config=plain).logits[0]
            own = together.row == len(batch.questions[0]) + number
            torch.testing.assert_close(together.logits[own], logits[-own.sum() - 1 : -1], rtol=1e-3, atol=1e-4)
            assert together.labels[own].tolist() == inputs["input_ids"][0, -own.sum() :].tolist()

    def test_labels_are_of_the_later_frame_of_a_pair(self):
        assert told_frames(6, 2).tolist() == [1, 3, 5]
        assert told_frames(5, 2).tolist() == [1, 3, 4]
        assert told_frames(3, 1).tolist() == [0, 1, 2]
        clip = moving("right", (0.8, 0.5))
        pairs = labels_of(clip).at(told_frames(8, 2))
        assert (pairs.index == patch_labels(clip, TIMES[1::2], clip.masks(TIMES[1::2], 112), 7).index).all()
        assert pairs.names == ["red square"]
        batch = next(b for b in map(PairedClips(0, 100).draw, range(60, 100)) if b.frames.shape[1] == 6)
        assert batch.labels[0].colors.shape == (3, 49)
        assert all(part.shape == (3, 49) for part in batch.trends[0])

    def test_it_starts_from_the_bundled_model(self, trainer):
        model, bundled = (
            trainer.model,
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32),
        )
        layer, theirs = model.model.language_model.layers[3], bundled.model.language_model.layers[3]
        assert torch.equal(layer.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
        assert torch.equal(layer.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
        tokenizer = HoliTomProcessor.from_pretrained(BUNDLED_MODEL).tokenizer
        [ours], [word] = (t("circle")["input_ids"] for t in (trainer.processor.tokenizer, tokenizer))
        assert torch.equal(model.lm_head.weight[ours], bundled.lm_head.weight[word])

        # A still picture's patches go into the blocks as they do there.
        frames = np.random.default_rng(0).integers(0, 255, (1, 1, 112, 112, 3), dtype=np.uint8)
        videos = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)
        patches = trainer.processor.video_processor(
            list(videos), do_sample_frames=False, do_resize=False, return_tensors="pt"
        )
        embedded = model.model.visual.patch_embed(patches["pixel_values_videos"]).view(7, 7, 2, 2, -1)
        pixels = torch.from_numpy(frames[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = bundled.model.vision_tower.embeddings.patch_embedding(pixels)[0]
        torch.testing.assert_close(embedded.permute(4, 0, 2, 1, 3).reshape(-1, 14, 14), expected, rtol=1e-4, atol=1e-4)

    def test_both_phases_run_and_leave_a_checkpoint(self, trainer, small_batches):
        losses = []
        trainer._log = lambda every, values: losses.append(values["loss"])
        trainer.train_vision()
        before = trainer.model.model.visual.merger.linear_fc1.weight.clone()
        blocks = {name: v.clone() for name, v in trainer.model.model.visual.blocks.state_dict().items()}
        trainer.train_answers()
        assert np.isfinite(losses).all()
        assert len(losses) == 5
        assert not torch.equal(before, trainer.model.model.visual.merger.linear_fc1.weight)
        for name, value in trainer.model.model.visual.blocks.state_dict().items():
            assert torch.equal(blocks[name], value)
        model = HoliTomQwen3VLForConditionalGeneration.from_pretrained(trainer.folder / "model")
        assert model.dtype == torch.bfloat16
        assert (trainer.folder / "model" / "model.safetensors").stat().st_size < 6e6
