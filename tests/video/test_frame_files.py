"""Videos that come as one image file for each frame."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from holitom_hf.bundled.tiny_model import tiny_processor
from holitom_hf.video.frame_files import read_frames
from holitom_hf.video.limits import VideoLimits

from ..videos import write_video


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(side=32, patch=4, num_frames=4)


@pytest.fixture
def pictures(tmp_path):
    """Six images of noise: their files, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{number}.png") for number in range(6)]
    for file, frame in zip(files, pixels):
        Image.fromarray(frame).save(file)
    return files, pixels


def test_frames_are_the_images_in_order_whatever_names_them(pictures, tmp_path):
    files, pixels = pictures
    content = (tmp_path / "1.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    with open(files[2], "rb") as file:
        frames, metadata = read_frames([tmp_path / "5.png", url, file, content])
        assert not file.closed
    assert torch.equal(frames, torch.from_numpy(pixels[[5, 1, 2, 1]]).permute(0, 3, 1, 2))
    assert (metadata.total_num_frames, metadata.frames_indices, metadata.fps) == (4, [0, 1, 2, 3], None)


def test_pictures_stand_upright_and_have_three_colours(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("L", (40, 24), 7).save(tmp_path / "turned.jpg", exif=exif)
    frames, _ = read_frames([tmp_path / "turned.jpg"])
    assert frames.shape == (1, 3, 40, 24)


def cut(folder):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:1500])


def other_size(folder):
    Image.new("RGB", (20, 24)).save(folder / "2.png")


BROKEN = {
    "missing": (lambda folder: (folder / "2.png").unlink(), FileNotFoundError, r"there is no image file '.*2\.png'$"),
    "empty": (lambda folder: (folder / "2.png").write_bytes(b""), ValueError, r"2\.png' is empty"),
    "text": (lambda folder: (folder / "2.png").write_text("hello"), ValueError, r"2\.png' is no BMP.* file"),
    "script": (lambda folder: (folder / "2.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), ValueError, "is no BMP"),
    "video": (
        lambda folder: write_video(folder / "2.png", 3, container_format="mp4"),
        ValueError,
        "a list of frames holds images",
    ),
    "cut": (cut, ValueError, r"2\.png' is cut off or damaged"),
    "size": (other_size, ValueError, r"2\.png' has 20 x 24 pixels, and the first frame of its video 40 x 24"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_missing_or_broken_image_is_named(processor, pictures, tmp_path, name):
    change, kind, message = BROKEN[name]
    change(tmp_path)
    with pytest.raises(kind, match=message):
        processor(text="<video>", videos=[[pictures[0]]])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_frames=5), "the list of images has 6 frames, more than the 5"),
        (VideoLimits(max_pixels=959), r"0\.png' has 960 pixels, more than the 959"),
        (VideoLimits(max_memory=17279), r"has 17280 bytes in all frames, more than the 17279"),
        (VideoLimits(max_bytes=100), r"0\.png' has \d+ bytes, more than the 100"),
        (VideoLimits(max_seconds=-1), "more than -1 s"),
    ],
)
def test_limits_hold_for_all_frames_together(pictures, limits, message):
    with pytest.raises(ValueError, match=message):
        read_frames(pictures[0], limits)


def test_bytes_have_the_limits_of_strangers():
    file = io.BytesIO()
    Image.new("1", (8192, 4321)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"has 35397632 pixels"):
        read_frames([file.getvalue()])


def test_image_files_are_frames_where_upstream_has_them_so(processor, pictures):
    """Upstream's rule: the files of a list that lies two lists deep, in a chat of a batch, are one video's frames."""
    files, pixels = pictures
    ours = processor(text=["<video>", "<video>"], videos=[[files[:4]], [files[4:]]], return_tensors="pt", padding=True)
    arrays = [torch.from_numpy(part).permute(0, 3, 1, 2) for part in (pixels[:4], pixels[4:])]
    plain = processor(text=["<video>", "<video>"], videos=arrays, return_tensors="pt", padding=True)
    assert torch.equal(ours["input_ids"], plain["input_ids"])
    for mine, theirs in zip(ours["pixel_values_videos"], plain["pixel_values_videos"], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("nest", [lambda a, b: [a, b], lambda a, b: [[a], [b]], lambda a, b: [[a, b]]])
def test_video_files_in_flatter_lists_stay_a_batch_of_videos(processor, tmp_path, nest):
    clips = [str(write_video(tmp_path / f"{n}.mp4", n)) for n in (9, 7)]
    outputs = processor(text=["<video>", "<video>"], videos=nest(*clips), return_tensors="pt", padding=True)
    assert outputs["pixel_values_videos"].shape[:2] == (2, 4)


def test_a_chat_may_hold_a_list_of_image_files(processor, pictures):
    files, pixels = pictures
    content = [{"type": "video", "url": files}, {"type": "text", "text": "?"}]

    def inputs(**kwargs):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=kwargs,
        )

    expected = processor.video_processor(torch.from_numpy(pixels).permute(0, 3, 1, 2), return_tensors="pt")
    assert torch.equal(inputs()["pixel_values_videos"], expected["pixel_values_videos"])
    with pytest.raises(ValueError, match="Sampling frames from a list of images is not supported"):
        inputs(num_frames=2)
