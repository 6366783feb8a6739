"""Pictures of a merged video: what they say of each token, and the files that hold them."""

import json
import re
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.picture_files import view_merging
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
from holitom_hf.merging.merged_video import TokenKind
from holitom_hf.merging.tensors import merge_video_tokens


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


class TestCommand:
    def test_a_picture(self, demo, tmp_path):
        out = tmp_path / "new" / "merged.png"
        result = run("visualize", demo / "clip.mp4", "-o", out, "--model", demo / "model", "--frames", 8)
        assert re.search(r"392 tokens of 8 frames in \d segments, \d+ kept, \d+ left", " ".join(result.stdout.split()))
        picture = np.asarray(Image.open(out).convert("RGB"))
        assert picture.shape[1] == 1650
        assert picture.std() > 20
        assert [file.name for file in out.parent.iterdir()] == ["merged.png"]

    def test_a_video_shows_each_frame_beside_its_tokens_and_counts_from_1(self, demo, tmp_path, monkeypatch):
        texts, draw = [], ImageDraw.ImageDraw.text
        monkeypatch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda self, xy, text, *args: (texts.append(text), draw(self, xy, text, *args)),
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
