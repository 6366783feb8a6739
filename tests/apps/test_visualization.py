"""Pictures of a merged video: what they say of each token, and the files that hold them."""

import json
import re
import shutil

import av
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from holitom_hf import (
    HoliTomConfig,
    HoliTomQwen3VLConfig,
    HoliTomQwen3VLForConditionalGeneration,
    HoliTomQwen3VLProcessor,
    HoliTomQwen3VLVideoProcessor,
)
from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.picture_files import MergingView, view_merging, write_page
from holitom_hf.apps.visualization import (
    COLORS,
    Fate,
    fates_after_stage_3,
    frame_legend,
    paint_computed,
    paint_frame,
    plot_merging,
    token_fates,
)
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.merging.merged_video import MergedVideo, TokenKind
from holitom_hf.merging.tensors import merge_video_tokens
from holitom_hf.video.encoding import write_video

from ..models.qwen import QWEN3_VL, config_for, make_processor


NUM_FRAMES, SIDE = 9, 4


def run(*arguments, check: int = 0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == check, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module", params=[{}, {"contextual_ratio": 0.5}, {"outer_method": "visionzip"}], ids=str)
def merged(request):
    """Two still scenes, a corner of which changes; kept, merged and dropped tokens of every kind."""
    random = torch.Generator().manual_seed(0)
    scenes = torch.randn(2, SIDE * SIDE, 16, generator=random)
    features = scenes[torch.arange(NUM_FRAMES) // 5].clone()
    features[:, :6] = torch.randn(NUM_FRAMES, 6, 16, generator=random)
    importance = torch.rand(NUM_FRAMES, SIDE * SIDE, generator=random)
    keys = torch.randn(NUM_FRAMES, SIDE * SIDE, 8, generator=random)
    settings = HoliTomConfig(retention_ratio=0.3, **request.param)
    return merge_video_tokens(features, importance, settings, keys=keys)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, 32, 48, 3), dtype=np.uint8)


def test_every_token_is_told_what_became_of_it(merged):
    """Against a plain loop over the record."""
    fates = token_fates(merged)
    for frame in range(NUM_FRAMES):
        for position in range(SIDE * SIDE):
            target = int(merged.assignment[frame, position])
            if target < 0:
                expected = Fate.DROPPED
            else:
                is_itself = (int(merged.frame[target]), int(merged.position[target])) == (frame, position)
                if int(merged.kind[target]) == TokenKind.STATIC:
                    expected = Fate.STATIC_KEPT if is_itself else Fate.STATIC_MERGED
                else:
                    expected = Fate.DYNAMIC_KEPT if is_itself else Fate.DYNAMIC_MERGED
            assert int(fates[frame, position]) == expected
    kept = (fates == Fate.STATIC_KEPT) | (fates == Fate.DYNAMIC_KEPT)
    assert int(kept.sum()) == merged.num_tokens


def test_only_kept_tokens_are_tinted():
    grey = np.full((40, 60, 3), 128, np.uint8)
    fates = np.array([Fate.DROPPED, Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT, Fate.STATIC_MERGED])
    painted = paint_frame(grey, fates).astype(int)
    dropped, static, dynamic, merged = (painted[y : y + 20, x : x + 30] for y in (0, 20) for x in (0, 30))
    for tile in (dropped, static, dynamic, merged):
        assert (tile == tile[0, 0]).all()
    assert (dropped < 60).all()
    assert (merged > 180).all()
    for neutral in (dropped, merged):
        assert (neutral.std(-1) == 0).all()
    for tile, color in ((static, "#0072B2"), (dynamic, "#D55E00")):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.sign(tile[0, 0] - 128) == np.sign(wanted - 128)).all()
    np.testing.assert_array_equal(paint_frame(grey, np.array([Fate.DYNAMIC_MERGED])), paint_frame(grey, fates[3:]))


def test_a_legend_names_what_occurs_and_nothing_else(merged):
    fates = token_fates(merged).numpy()
    names = [name for _, name in frame_legend(fates)]
    occurs = {Fate(value) for value in np.unique(fates)}
    assert ("static, kept for its segment" in names) == (Fate.STATIC_KEPT in occurs)
    assert ("dynamic, selected" in names) == (Fate.DYNAMIC_KEPT in occurs)
    assert ("merged into a kept one" in names) == bool({Fate.STATIC_MERGED, Fate.DYNAMIC_MERGED} & occurs)
    assert ("dropped" in names) == (Fate.DROPPED in occurs)
    assert [name for _, name in frame_legend(np.full((2, 16), Fate.DYNAMIC_KEPT))] == ["dynamic, selected"]


@pytest.mark.parametrize("fold", [True, False])
def test_what_stage_3_removed_is_merged_or_dropped(merged, fold):
    """Against a plain loop over the record."""
    fates = token_fates(merged)
    survives = torch.rand(merged.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    after = fates_after_stage_3(merged, fates.numpy(), survives.numpy(), fold)
    for frame in range(NUM_FRAMES):
        for position in range(SIDE * SIDE):
            before, expected = int(fates[frame, position]), int(fates[frame, position])
            if before in (Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT):
                target = int(merged.assignment[frame, position])
                if not survives[target]:
                    expected = before + 1 if fold else Fate.DROPPED
            assert after[frame, position] == expected
    kept = (after == Fate.STATIC_KEPT) | (after == Fate.DYNAMIC_KEPT)
    assert kept.sum() == survives.sum()


def test_the_tokens_shown_after_stage_3_are_those_the_decoder_kept(demo):
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    question = "Which way does the white square move?"
    view = view_merging(answerer, str(demo / "clip.mp4"), question=question)
    prepared = answerer.prepare(str(demo / "clip.mp4"), question)
    answerer.encode(prepared)
    output = answerer.model.generate(
        **{name: prepared.features[name] for name in ("input_ids", "attention_mask")},
        mm_encoder_outputs={"video": prepared.encoded},
        max_new_tokens=1,
        return_dict_in_generate=True,
    )
    inside, video = [], iter(range(view.merged.num_tokens))  # what enters the decoder, one by one
    for token in prepared.features["input_ids"][0].tolist():
        if token != answerer.model.config.video_token_id:
            inside.append(None)
        elif (number := next(video, None)) is not None:
            inside.append(number)
        elif inside[-1] is not None:
            inside += ["newline"] if inside[-1] != "newline" else []
    kept = [inside[index] for index in output.inner_keep[0].tolist()]
    assert view.survives.nonzero()[:, 0].tolist() == [number for number in kept if isinstance(number, int)]
    assert 0 < view.survives.sum() < view.merged.num_tokens
    other = view_merging(answerer, str(demo / "clip.mp4"), question="What is the background at the start?")
    assert not torch.equal(other.survives, view.survives)  # it depends on the question


def test_colors_differ_in_lightness_or_hue_for_the_colour_blind():
    """Seen without red-green difference (deuteranopia, Viénot's approximation) no two are close."""

    def seen(color):
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        yellow = 0.29 * red + 0.71 * green
        return np.array([yellow, blue])

    colors = [seen(color) for color in COLORS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colors) for b in colors[:i]) > 40


@pytest.mark.parametrize("has_stage_3", [True, False])
@pytest.mark.parametrize("num_shown", [1, 3, 9])
def test_the_figure_has_every_frame_untouched_and_in_each_state_and_all_counts(num_shown, has_stage_3):
    features = torch.randn(num_shown, SIDE * SIDE, 16, generator=torch.Generator().manual_seed(1))
    merged = merge_video_tokens(features, torch.rand(num_shown, SIDE * SIDE), HoliTomConfig(retention_ratio=0.3))
    similarity = torch.zeros(num_shown - 1, SIDE * SIDE)
    frames = np.random.default_rng(0).integers(0, 255, (num_shown, 32, 48, 3), dtype=np.uint8)
    survives = torch.arange(merged.num_tokens) % 2 == 0 if has_stage_3 else None
    figure = plot_merging(merged, frames, similarity, threshold=0.8, survives=survives, question="What?")
    images = [image.get_array() for axes in figure.axes for image in axes.images]
    assert len(images) == num_shown * (3 if has_stage_3 else 2)
    for frame in frames:
        assert sum(np.array_equal(image, frame) for image in images) == 1
    assert len(figure.axes) == (3 if num_shown > 1 else 2)
    texts = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    assert len(re.findall(r"frames? \d", texts)) >= len(merged.segments)
    assert "frame 0" not in texts
    assert ("stage 3" in texts) == has_stage_3
    if has_stage_3:
        assert f"{int(survives.sum())} tokens" in texts
    assert f"{merged.num_tokens} tokens" in texts
    figure.canvas.draw()


def test_patches_that_were_taken_over_are_pale():
    frame = np.random.default_rng(0).integers(0, 200, (24, 36, 3), dtype=np.uint8)
    computed = np.zeros(36, dtype=bool)
    computed[[0, 7, 35]] = True
    painted = paint_computed(frame, computed)
    for patch in range(36):
        place = (slice(patch // 6 * 4, patch // 6 * 4 + 4), slice(patch % 6 * 6, patch % 6 * 6 + 6))
        assert (painted[place] == frame[place]).all() == computed[patch]
        assert (painted[place].astype(int) >= frame[place]).all()
    wide = paint_computed(frame, computed, (4, 9))  # of 6 x 4 pixels
    assert (wide[:6, :4] == frame[:6, :4]).all()
    assert (wide[:6, 4:28] != frame[:6, 4:28]).any(-1).all()
    assert (wide[:6, 28:32] == frame[:6, 28:32]).all()
    with pytest.raises(ValueError, match="of 36 tokens a frame"):
        paint_computed(frame, computed, (4, 8))


def test_the_picture_and_the_summary_tell_what_the_tower_computed(demo, tmp_path):
    preset = tmp_path / "fast.json"
    settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9, inner_method="none")
    preset.write_text(json.dumps(settings.to_dict()))
    answerer = Answerer(str(demo / "model"), settings=settings)
    answerer.load_model()
    view = view_merging(answerer, str(demo / "clip.mp4"), 4)
    assert view.computed.shape == (4, 196)
    assert view.computed[0].all()
    figure = plot_merging(view.merged, view.frames, computed=view.computed)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == f"patch taken over in the vision tower ({view.computed.mean():.0%} are computed)"
    options = ("--model", demo / "model", "--frames", 4)
    share = f"{view.computed.mean():.1%}"
    for name in ("page.html", "clip.mp4"):
        run("visualize", demo / "clip.mp4", "-o", tmp_path / name, *options, "--preset", preset)
    assert f"computed {share} of the patches" in (tmp_path / "page.html").read_text()
    result = run("answer", demo / "clip.mp4", "?", *options, "--preset", preset)
    assert f"{share} of the patches computed in its later layers" in result.stdout
    result = run("answer", demo / "clip.mp4", "?", *options, "--json")
    assert json.loads(result.stdout)["computed_patches"] is None


def test_frames_that_are_not_the_videos_are_refused(merged, frames):
    with pytest.raises(ValueError, match=r"expected \(9, height, width, 3\) frames of uint8, got \(8, 32, 48, 3\)"):
        plot_merging(merged, frames[:-1])
    with pytest.raises(ValueError, match="of float64"):
        plot_merging(merged, frames / 255)


GRID = 3, 5  # rows and columns


def kept_tokens(places, num_frames: int, grid: tuple[int, int]) -> MergedVideo:
    """A video of which the tokens at (frame, row, column) are kept as they are, and nothing else."""
    rows, columns = grid
    frame, row, column = torch.tensor(places).T
    position = row * columns + column
    assignment = torch.full((num_frames, rows * columns), -1)
    assignment[frame, position] = torch.arange(len(places))
    segments = [(number, number + 1) for number in range(num_frames)]
    kind = torch.full_like(frame, TokenKind.DYNAMIC)
    return MergedVideo(torch.zeros(len(places), 8), segments, 1.0, frame, position, kind, assignment)


def outlined(figure, image) -> set[tuple[float, ...]]:
    """Left, top, width and height of the outlines over an image, in widths and heights of it."""
    [axes] = [axes for axes in figure.axes if image in axes.images]
    left, right, bottom, top = image.get_extent()
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    found = [
        (
            (box.get_x() - left) / (right - left),
            (box.get_y() - top) / (bottom - top),
            box.get_width() / (right - left),
            box.get_height() / (bottom - top),
        )
        for box in boxes
    ]
    return {tuple(round(value, 4) for value in box) for box in found if 0 <= box[0] < 1 and 0 <= box[1] < 1}


class TestGrids:
    @pytest.mark.parametrize("grid", [(3, 5), (5, 3), (2, 8), (1, 4)])
    def test_a_token_is_painted_where_it_is(self, grid):
        rows, columns = grid
        frame = np.full((rows * 8, columns * 6, 3), 128, np.uint8)
        for row in range(rows):
            for column in range(columns):
                fates = np.full(rows * columns, Fate.DROPPED)
                fates[row * columns + column] = Fate.DYNAMIC_KEPT
                is_dark = (paint_frame(frame, fates, grid) < 60).all(-1)
                expected = np.ones_like(is_dark)
                expected[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6] = False
                np.testing.assert_array_equal(is_dark, expected)

    def test_cells_share_the_pixels_of_a_frame_that_is_no_multiple_of_them(self):
        fates = np.tile([Fate.DROPPED, Fate.STATIC_MERGED], 8)[:15]
        painted = paint_frame(np.full((10, 12, 3), 128, np.uint8), fates, GRID)
        is_dark = (painted < 60).all(-1)
        for y in range(10):
            for x in range(12):
                place = y * 3 // 10 * 5 + x * 5 // 12
                assert is_dark[y, x] == (place % 2 == 0)

    def test_a_figure_outlines_kept_tokens_where_they_are(self):
        places = [(0, 0, 4), (0, 2, 1), (1, 1, 0), (3, 2, 4)]
        frames = np.zeros((4, 30, 40, 3), np.uint8)
        figure = plot_merging(kept_tokens(places, 4, GRID), frames, grid=GRID)
        [axes] = [axes for axes in figure.axes if axes.images]
        for frame, image in enumerate(axes.images[1::2]):  # every other one is untouched
            expected = {
                (round(column / 5, 4), round(row / 3, 4), round(1 / 5, 4), round(1 / 3, 4))
                for of, row, column in places
                if of == frame
            }
            assert outlined(figure, image) == expected

    @pytest.mark.parametrize(
        ("grid", "match"),
        [
            (None, r"15 tokens a frame are no square: pass grid=\(rows, columns\)"),
            ((4, 4), r"grid must be \(rows, columns\) of 15 tokens a frame, got \(4, 4\)"),
            ((-3, -5), "got .-3, -5."),
            ((3, 5, 1), "got .3, 5, 1."),
        ],
    )
    def test_a_grid_that_does_not_fit_is_refused(self, grid, match):
        with pytest.raises(ValueError, match=match) as raised:
            plot_merging(kept_tokens([(0, 0, 0)], 2, GRID), np.zeros((2, 30, 40, 3), np.uint8), grid=grid)
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=match):
            paint_frame(np.zeros((30, 40, 3), np.uint8), np.zeros(15, int), grid)

    def test_of_a_temporal_patch_the_first_frame_is_drawn_with_all_numbers(self):
        merged = kept_tokens([(0, 0, 0), (1, 0, 0), (2, 0, 0)], 3, GRID)
        merged.segments = [(0, 2), (2, 3)]
        frames = np.random.default_rng(0).integers(0, 255, (5, 30, 40, 3), dtype=np.uint8)
        figure = plot_merging(merged, frames, grid=GRID, temporal_patch_size=2)
        [axes] = [axes for axes in figure.axes if axes.images]
        untouched = [np.asarray(image.get_array()) for image in axes.images[::2]]
        np.testing.assert_array_equal(np.stack(untouched), frames[[0, 2, 4]])
        texts = [text.get_text() for text in axes.texts]
        assert [text for text in texts if re.fullmatch(r"[\d-]+", text)] == ["1-2", "3-4", "5"]
        assert [text for text in texts if "frame" in text] == ["segment 1: frames 1-4", "2: frame 5"]
        for num_frames in (4, 7):
            with pytest.raises(ValueError, match=r"expected \(5 to 6, height, width, 3\) frames of uint8"):
                plot_merging(merged, frames[[0] * num_frames], grid=GRID, temporal_patch_size=2)

    def test_the_curve_stands_between_the_frames_that_it_compares(self):
        merged = kept_tokens([(0, 0, 0)], 4, GRID)
        merged.segments = [(0, 3), (3, 4)]
        figure = plot_merging(
            merged, np.zeros((7, 30, 40, 3), np.uint8), torch.full((3, 15), 0.5), grid=GRID, temporal_patch_size=2
        )
        curve, cut = figure.axes[0].lines
        assert list(curve.get_xdata()) == [2.5, 4.5, 6.5]
        assert set(cut.get_xdata()) == {6.5}
        assert figure.axes[0].get_xlim() == (1, 7)


class TestSizes:
    def test_kept_tokens_that_count_for_several_have_their_number(self, tmp_path):
        settings = {"retention_ratio": 0.3, "proportional_attention": True}
        features = torch.randn(4, 15, 8, generator=torch.Generator().manual_seed(5))
        frames = np.zeros((4, 30, 40, 3), np.uint8)
        merged = merge_video_tokens(
            features, torch.ones(4, 15), HoliTomConfig(outer_method="farthest_points", **settings)
        )
        counts = torch.bincount(merged.representative.flatten()).tolist()
        figure = plot_merging(merged, frames, grid=GRID, method="farthest points", sizes=merged.sizes)
        [axes] = [axes for axes in figure.axes if axes.images]
        found = {}
        for text in axes.texts:
            is_number = text.get_color() == "white" and text.get_ha() == "center"
            if is_number:
                found[text.get_position()] = int(text.get_text())
        expected = {}
        for token, (frame, position) in enumerate(zip(merged.frame.tolist(), merged.position.tolist())):
            left, right, bottom, top = axes.images[2 * frame + 1].get_extent()
            x = left + (position % 5 + 0.5) / 5 * (right - left)
            y = top + (position // 5 + 0.5) / 3 * (bottom - top)
            if counts[token] > 1:
                expected[x, y] = counts[token]
        assert sorted(found.values()) == sorted(expected.values())
        for (place, number), (other, expected_number) in zip(sorted(found.items()), sorted(expected.items())):
            assert place == pytest.approx(other)
            assert number == expected_number
        assert sum(counts) == 60
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "counts for so many tokens" in names

        view = MergingView(
            "clip", frames, merged, GRID, torch.zeros(3, 15), None, method="farthest points", counts=True
        )
        write_page(view, tmp_path / "a.html")
        page = (tmp_path / "a.html").read_text()
        assert "after farthest points." in page
        named = {
            int(token): int(n) for token, n in re.findall(r'kept" data-t="(\d+)" data-f="3" data-n="(\d+)"', page)
        }
        assert named == {token: n for token, n in enumerate(counts) if n > 1}

    @pytest.mark.parametrize(("side", "is_counting"), [(4, False), (40, True)])
    def test_there_are_none_where_nothing_counts_or_there_is_no_room(self, side, is_counting):
        settings = HoliTomConfig(retention_ratio=0.1, outer_method="farthest_points")
        merged = merge_video_tokens(torch.randn(8, side * side, 8), torch.ones(8, side * side), settings)
        sizes = merged.sizes if is_counting else None
        figure = plot_merging(merged, np.zeros((8, 30, 40, 3), np.uint8), sizes=sizes)
        assert "counts for so many tokens" not in [text.get_text() for text in figure.legends[0].get_texts()]
        assert not [text for axes in figure.axes[:1] for text in axes.texts if text.get_ha() == "center"]


def test_a_figures_legend_names_what_each_row_shows():
    """Stage 3 may merge where nothing was merged before; then no token has moved in the row that shows moves."""
    chosen, frames = kept_tokens([(0, 0, 0), (0, 2, 3), (1, 1, 1)], 2, GRID), np.zeros((2, 30, 40, 3), np.uint8)
    survives = torch.tensor([True, False, True])

    def names(**kwargs):
        figure = plot_merging(chosen, frames, grid=GRID, **kwargs)
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert names() == ["dynamic, selected", "dropped"]
    assert names(survives=survives) == ["dynamic, selected", "merged into a kept one", "dropped"]
    assert names(survives=survives, fold=False) == ["dynamic, selected", "dropped"]


def test_the_second_row_has_the_methods_name(merged, frames):
    def names(**kwargs):
        axes = plot_merging(merged, frames, **kwargs).axes[0]
        return {" ".join(text.get_text().split()) for text in axes.texts if text.get_rotation() == 90}

    assert names() == {"video", "stages 1, 2"}
    assert names(method="farthest points of the video") == {"video", "farthest points of the video"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a wide clip.mp4 of two scenes, in which something moves, and a small Qwen3-VL."""
    folder = tmp_path_factory.mktemp("qwen")
    frames = np.full((36, 64, 112, 3), 60, np.uint8)
    frames[18:, :, :, 2] = 200
    frames[:18, 40:60, 70:100] = (200, 180, 40)
    for number, frame in enumerate(frames):
        frame[8:24, 2 * number : 2 * number + 20] = 230
    write_video(folder / "clip.mp4", frames, fps=8)
    processor = make_processor(HoliTomQwen3VLProcessor, HoliTomQwen3VLVideoProcessor)
    processor.video_processor.size = {"shortest_edge": 64, "longest_edge": 10 * 32 * 56}
    processor.save_pretrained(folder / "model")
    torch.manual_seed(0)
    settings = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.9, inner_merge_layer=2)
    config = config_for(HoliTomQwen3VLConfig, QWEN3_VL, processor.tokenizer, holitom_config=settings)
    HoliTomQwen3VLForConditionalGeneration(config).save_pretrained(folder / "model")
    return folder


def generated(folder, video, question, num_frames):
    """What the model does by itself with a file: its inputs, and what it kept."""
    processor = HoliTomQwen3VLProcessor.from_pretrained(folder / "model")
    model = HoliTomQwen3VLForConditionalGeneration.from_pretrained(folder / "model").eval()
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, videos=str(video), num_frames=num_frames, return_tensors="pt")
    return inputs, model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)


class TestQwen:
    def test_what_is_shown_is_what_the_model_kept(self, qwen):
        """Walking through the prompt token by token: temporal patches stand apart in it, with text between."""
        question = "What moves?"
        inputs, output = generated(qwen, qwen / "clip.mp4", question, 9)
        answerer = Answerer(str(qwen / "model"), device="cpu")
        answerer.load_model()
        view = view_merging(answerer, str(qwen / "clip.mp4"), 9, question)
        [[merged]] = output.merged_videos
        assert torch.equal(view.merged.place, merged.place)
        assert torch.equal(view.merged.assignment, merged.assignment)
        num_patches, height, width = inputs["video_grid_thw"][0].tolist()
        assert (num_patches, view.grid) == (5, (height // 2, width // 2))
        assert view.grid[0] < view.grid[1]
        assert view.computed is None

        inside, slot, kept = [], 0, set(merged.place.tolist())
        for token in inputs["input_ids"][0].tolist():
            if token != answerer.model.config.video_token_id:
                inside.append(None)
                continue
            if slot in kept:
                inside.append(slot)
            slot += 1
        left = [inside[index] for index in output.inner_keep[0].tolist()]
        left = [place for place in left if place is not None]
        assert view.merged.place[view.survives].tolist() == left
        # Behind the first temporal patch some were removed, and others not.
        assert 0 < sum(place >= height * width // 4 for place in left) < int((merged.frame > 0).sum())

    def test_a_picture(self, qwen, tmp_path):
        result = run(
            "visualize", qwen / "clip.mp4", "-o", tmp_path / "a.png", "--model", qwen / "model", "--frames", 9
        )
        assert re.search(r"tokens of 9 frames in \d segments?, \d+ kept, \d+ left", " ".join(result.stdout.split()))
        assert np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).std() > 20

    def test_a_page_has_the_cells_of_the_models_grid(self, qwen, tmp_path):
        options = ("--model", qwen / "model", "--frames", 9, "--question", "What moves?")
        run("visualize", qwen / "clip.mp4", "-o", tmp_path / "a.html", *options)
        page = (tmp_path / "a.html").read_text()
        inputs, output = generated(qwen, qwen / "clip.mp4", "What moves?", 9)
        [[merged]] = output.merged_videos
        num_patches, rows, columns = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
        pictures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
        assert len(pictures) == num_patches
        kept = set()
        for frame, picture in enumerate(pictures):
            boxes = re.findall(r'<rect class="([^"]*)"[^>]* x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', picture)
            assert len(boxes) == rows * columns
            for classes, x, y, width in boxes:
                assert float(width) == pytest.approx(112 / columns, abs=0.01)
                place = round(float(y) / 64 * rows) * columns + round(float(x) / 112 * columns)
                if "kept" in classes:
                    kept.add(frame * rows * columns + place)
        assert kept == set(merged.place.tolist())
        captions = re.findall(r"<figcaption>([\d-]+)</figcaption>", page)
        assert captions == ["1-2", "3-4", "5-6", "7-8", "9"]

    def test_a_clip_has_a_picture_for_each_temporal_patch(self, qwen, tmp_path, monkeypatch):
        texts, draw = [], ImageDraw.ImageDraw.text
        monkeypatch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda self, xy, text, *args, **kwargs: (texts.append(text), draw(self, xy, text, *args, **kwargs)),
        )
        run("visualize", qwen / "clip.mp4", "-o", tmp_path / "a.mp4", "--model", qwen / "model", "--frames", 6)
        with av.open(str(tmp_path / "a.mp4")) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == 3
        assert shown[0].shape == (448 + 96, 2 * 784 + 24, 3)
        titles = [text for text in texts if text.endswith("of 6")]
        assert titles == ["frames 1-2 of 6", "frames 3-4 of 6", "frames 5-6 of 6"]

    def test_the_picture_and_the_summary_tell_what_the_tower_computed(self, qwen, tmp_path):
        preset = tmp_path / "fast.json"
        settings = HoliTomConfig(vision_reuse_layer=1, vision_reuse_threshold=0.9, inner_method="none")
        preset.write_text(json.dumps(settings.to_dict()))
        answerer = Answerer(str(qwen / "model"), settings=settings, device="cpu")
        answerer.load_model()
        view = view_merging(answerer, str(qwen / "clip.mp4"), 9)
        assert view.patch_grid == (2 * view.grid[0], 2 * view.grid[1])
        assert view.computed.shape == (5, view.patch_grid[0] * view.patch_grid[1])
        assert view.computed[0].all()
        assert not view.computed.all()
        plot_merging(
            view.merged,
            view.frames,
            computed=view.computed,
            grid=view.grid,
            temporal_patch_size=2,
            patch_grid=view.patch_grid,
        )
        options, share = ("--model", qwen / "model", "--frames", 9, "--preset", preset), f"{view.computed.mean():.1%}"
        for name in ("page.html", "clip.mp4", "picture.png"):
            run("visualize", qwen / "clip.mp4", "-o", tmp_path / name, *options)
        assert f"computed {share} of the patches" in (tmp_path / "page.html").read_text()
        result = run("answer", qwen / "clip.mp4", "?", *options)
        assert f"{share} of the patches computed in its later layers" in result.stdout

    def test_what_is_only_llavas_says_so(self, qwen, tmp_path):
        preset = tmp_path / "frames.json"
        settings = HoliTomConfig(vision_reuse_layer=1, vision_method="frames", inner_merge_layer=2)
        preset.write_text(json.dumps(settings.to_dict()))
        options = ("--model", qwen / "model", "--preset", preset)
        error = run("visualize", qwen / "clip.mp4", "-o", tmp_path / "a.png", *options, check=1).stderr
        assert error.startswith("error: vision_method 'frames' is for LLaVA alone: with Qwen3-VL choose 'reuse'")
        assert len(error.strip().splitlines()) == 1


class TestCommand:
    def test_a_picture(self, demo, tmp_path):
        out = tmp_path / "new" / "merged.png"
        result = run("visualize", demo / "clip.mp4", "-o", out, "--model", demo / "model", "--frames", 8)
        assert re.search(
            r"392 tokens of 8 frames in \d segments?, \d+ kept, \d+ left", " ".join(result.stdout.split())
        )
        picture = np.asarray(Image.open(out).convert("RGB"))
        assert picture.shape[1] == 1650
        assert picture.std() > 20
        assert [file.name for file in out.parent.iterdir()] == ["merged.png"]

    def test_a_video_shows_each_frame_beside_its_tokens_and_counts_from_1(self, demo, tmp_path, monkeypatch):
        texts, draw = [], ImageDraw.ImageDraw.text
        monkeypatch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda self, xy, text, *args, **kwargs: (texts.append(text), draw(self, xy, text, *args, **kwargs)),
        )
        run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.mp4", "--model", demo / "model", "--frames", 5)
        with av.open(str(tmp_path / "a.mp4")) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == 5
        assert shown[0].shape == (448 + 96, 2 * 448 + 24, 3)
        assert [text for text in texts if text.startswith("frame")] == [f"frame {n} of 5" for n in range(1, 6)]
        spans = [re.search(r"frames? (\d)(?:-(\d))?: ", text) for text in texts if text.startswith("segment")]
        covered = [(int(span[1]), int(span[2] or span[1])) for span in spans]
        assert all(first <= number <= last for number, (first, last) in enumerate(covered, 1))
        assert (covered[0][0], covered[-1][1]) == (1, 5)

    def test_a_page_needs_nothing_else_and_names_every_token(self, demo, tmp_path):
        options = ["--model", demo / "model", "--frames", 6, "--question", "Is <b> red?"]
        run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.html", *options)
        page = (tmp_path / "a.html").read_text()
        assert page.count("<rect class=") == 6 * 49
        assert page.count("data:image/jpeg;base64,") == 6
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page.replace("xlink:", ""))
        num_kept = len(re.findall(r'class="f\d kept', page))
        num_gone = len(re.findall(r'class="f\d kept gone"', page))
        assert re.search(rf"Stage 3, asked <q>Is &lt;b&gt; red\?</q>, left {num_kept - num_gone}:", page)
        assert re.search(rf"became {num_kept} \(", page)

    @pytest.mark.parametrize("width", [900, 1900])
    def test_a_page_is_filled(self, demo, tmp_path, width):
        playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("no Chromium on this machine")
        run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.html", "--model", demo / "model")
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((tmp_path / "a.html").as_uri())
            boxes = [figure.bounding_box() for figure in page.locator("figure").all()]
            is_scrolled = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            browser.close()
        rows = [[box for box in boxes if box["y"] == y] for y in sorted({box["y"] for box in boxes})]
        assert len(boxes) == 32
        assert len({round(box["width"]) for box in boxes}) == 1
        assert len({len(row) for row in rows[:-1]}) == 1
        right = max(box["x"] + box["width"] for box in boxes)
        assert right - min(box["x"] for box in boxes) == pytest.approx(width - 64, abs=2)  # all but the margins
        assert not is_scrolled

    def test_what_cant_be_shown_is_one_line(self, demo, tmp_path):
        model = ("--model", demo / "model")
        error = run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.gif", *model, check=1).stderr
        assert re.fullmatch(r"error: can't write '.*a\.gif': name a file that ends in \.png, \.mp4, \.html\n", error)
        error = run("visualize", tmp_path / "no.mp4", "-o", tmp_path / "a.png", *model, check=1).stderr
        assert "there is no video file" in error
        settings = tmp_path / "none.json"
        settings.write_text('{"outer_method": "none", "inner_merge_layer": 5}')
        error = run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.png", *model, "--preset", settings, check=1)
        assert "nothing is merged that could be shown" in error.stderr
        assert not list(tmp_path.glob("a.*"))
