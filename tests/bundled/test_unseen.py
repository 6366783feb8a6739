"""The second family of test clips: all in the picture, apart, in every encoding, with as many frames as they say."""

import json

import numpy as np

from holitom_hf import HoliTomVideoProcessor
from holitom_hf.bundled.questions import DrawnVideoQuestions, draw_set, read_set, uniform_times, write_set
from holitom_hf.video.encoding import ENCODINGS


CLIPS = [clip for clip, _ in draw_set(150, "unseen")]


def test_every_shape_is_whole_and_alone_whenever_it_is_there():
    for clip in CLIPS:
        times = uniform_times(clip.num_frames)
        covered = clip.masks(times, 112) > 0.5
        visible = np.array([shape.is_visible(times) for shape in clip.shapes]).T.reshape(len(times), -1)
        assert (covered.any((2, 3)) == visible).all()
        assert covered.sum(1).max() <= 1
        edge = np.concatenate([covered[..., [0, -1], :].ravel(), covered[..., [0, -1]].ravel()])
        assert not edge.any()


def test_the_family_has_what_training_has_not():
    assert {clip.num_frames for clip in CLIPS} >= {4, 32}
    assert {clip.encoding for clip in CLIPS} == set(ENCODINGS)
    assert any(clip.zoom > 1 for clip in CLIPS)
    assert any(clip.zoom < 1 for clip in CLIPS)
    assert any(clip.light < 0.7 for clip in CLIPS)
    assert any(clip.dissolve and len(clip.scenes) > 1 for clip in CLIPS)
    shapes = [shape for clip in CLIPS for shape in clip.shapes]
    assert any(shape.is_outlined for shape in shapes)
    assert all(shape.tilt for shape in shapes)


def test_second_questions_come_after_another_one_about_the_same_clip(tmp_path):
    drawn = [questions for _, questions in draw_set(60, "unseen-turns")]
    assert sum(map(len, drawn)) == 60
    for questions in drawn:
        assert all(question.before and question.before != question.text for question in questions)
    written = write_set(tmp_path, 6, "unseen-turns", side=112)
    assert read_set(tmp_path) == written
    assert [q.before for q in written] == [q.before for _, asked in draw_set(6, "unseen-turns") for q in asked]
    assert [line["before"] for line in DrawnVideoQuestions(6, "unseen-turns")] == [q.before for q in written]


def test_first_questions_are_written_as_they_were(tmp_path):
    write_set(tmp_path, 3, "unseen", side=112)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == {"id", "video", "question", "answer", "type", "num_frames"}


def test_written_files_of_every_encoding_are_read_whole(tmp_path):
    written = write_set(tmp_path, 40, "unseen", side=112)
    assert read_set(tmp_path) == written
    clips = [clip for clip, _ in draw_set(40, "unseen")]
    found = {question.video: question.num_frames for question in written}
    assert {name[-4:] for name in found} == {".mp4", "webm"}
    processor = HoliTomVideoProcessor(size={"height": 112, "width": 112}, num_frames=16, do_normalize=False)
    for clip, (name, num_frames) in zip(clips, found.items(), strict=True):
        pixels = processor(str(tmp_path / name), num_frames=num_frames, return_tensors="pt")["pixel_values_videos"][0]
        drawn = clip.render(uniform_times(clip.num_frames), 112).transpose(0, 3, 1, 2) / 255
        assert pixels.shape == drawn.shape
        assert np.abs(pixels.numpy() - drawn).mean() < 0.05
