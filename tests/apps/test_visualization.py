"""Pictures of a merged video: what they say of each token, and the files that hold them."""

import re

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.visualization import COLORS, Fate, paint_frame, plot_merging, token_fates
from holitom_hf.merging.merged_video import TokenKind
from holitom_hf.merging.outer import merge_video_tokens


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


def test_veils_lie_over_the_right_part_of_a_frame():
    grey = np.full((40, 60, 3), 128, np.uint8)
    fates = np.array([Fate.DROPPED, Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT, Fate.STATIC_MERGED])
    painted = paint_frame(grey, fates).astype(int)
    assert (painted[:20, :30] < 60).all()  # dropped: dark, and grey
    assert (painted[:20, :30].std(-1) == 0).all()
    for place, color in (((0, 30), "#0072B2"), ((20, 0), "#D55E00"), ((20, 30), "#56B4E9")):
        tile = painted[place[0] : place[0] + 20, place[1] : place[1] + 30]
        assert (tile == tile[0, 0]).all()
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.sign(tile[0, 0] - 128) == np.sign(wanted - 128)).all()


def test_colors_differ_in_lightness_or_hue_for_the_colour_blind():
    """Seen without red-green difference (deuteranopia, Viénot's approximation) no two are close."""

    def seen(color):
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        yellow = 0.29 * red + 0.71 * green
        return np.array([yellow, blue])

    colors = [seen(color) for color in COLORS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(colors) for b in colors[:i]) > 40


@pytest.mark.parametrize("num_shown", [1, 3, 9])
def test_the_figure_has_a_picture_for_each_frame_and_all_counts(num_shown):
    features = torch.randn(num_shown, SIDE * SIDE, 16, generator=torch.Generator().manual_seed(1))
    merged = merge_video_tokens(features, torch.rand(num_shown, SIDE * SIDE), HoliTomConfig(retention_ratio=0.3))
    similarity = torch.zeros(num_shown - 1, SIDE * SIDE)
    figure = plot_merging(merged, np.zeros((num_shown, 32, 48, 3), np.uint8), similarity, threshold=0.8)
    assert sum(len(axes.images) for axes in figure.axes) == num_shown
    assert len(figure.axes) == (3 if num_shown > 1 else 2)
    texts = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    assert len(re.findall(r"frames? \d", texts)) >= len(merged.segments)
    assert f"{merged.num_tokens} tokens" in texts
    figure.canvas.draw()


def test_frames_that_are_not_the_videos_are_refused(merged, frames):
    with pytest.raises(ValueError, match=r"expected \(9, height, width, 3\) frames of uint8, got \(8, 32, 48, 3\)"):
        plot_merging(merged, frames[:-1])
    with pytest.raises(ValueError, match="of float64"):
        plot_merging(merged, frames / 255)


class TestCommand:
    def test_a_picture(self, demo, tmp_path):
        out = tmp_path / "new" / "merged.png"
        result = run("visualize", demo / "clip.mp4", "-o", out, "--model", demo / "model", "--frames", 8)
        assert re.search(r"392 tokens of 8 frames in \d segments, \d+ kept", " ".join(result.stdout.split()))
        picture = np.asarray(Image.open(out).convert("RGB"))
        assert picture.shape[1] == 1650
        assert picture.std() > 20
        assert [file.name for file in out.parent.iterdir()] == ["merged.png"]

    def test_a_video_shows_each_frame_beside_its_tokens(self, demo, tmp_path):
        run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.mp4", "--model", demo / "model", "--frames", 5)
        with av.open(str(tmp_path / "a.mp4")) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(shown) == 5
        assert shown[0].shape == (448 + 96, 2 * 448 + 24, 3)

    def test_a_page_needs_nothing_else_and_names_every_token(self, demo, tmp_path):
        run("visualize", demo / "clip.mp4", "-o", tmp_path / "a.html", "--model", demo / "model", "--frames", 6)
        page = (tmp_path / "a.html").read_text()
        assert page.count("<rect class=") == 6 * 49
        assert page.count("data:image/jpeg;base64,") == 6
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page.replace("xlink:", ""))
        num_kept = len(re.findall(r'class="f\d kept"', page))
        assert re.search(rf"became {num_kept} \(", page)

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
