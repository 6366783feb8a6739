"""A video that comes as one image file for each frame."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata

from .decoding import VideoFile, is_url, name_of, open_source
from .limits import LOCAL_LIMITS, PICTURES, VideoLimits


def read_frames(files: Sequence[VideoFile], limits: VideoLimits | None = None) -> tuple[torch.Tensor, VideoMetadata]:
    """
    Reads image files, in their order, as the frames of a video.

    Args:
        files: Of each: path, `http(s)` or base64 `data` URL, bytes or binary file object.
        limits: What the files may ask for, `max_bytes` each and the rest together; `None`: [`VideoLimits`] if there
            are bytes or URLs among them, `LOCAL_LIMITS` otherwise.

    Returns:
        (F, 3, H, W) uint8, upright as the files' EXIF says, and the metadata, without a frame rate.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL can't be read.
        ValueError: If a file is no picture or damaged, has another size than the first, or more than `limits` allow.
    """
    if limits is None:
        is_strange = any(isinstance(file, (bytes, bytearray)) or is_url(file) for file in files)
        limits = VideoLimits() if is_strange else LOCAL_LIMITS
    limits.check("the list of images", "frames", len(files), limits.max_frames)
    deadline, pictures = time.monotonic() + limits.max_seconds, []
    for file in files:
        if time.monotonic() > deadline:
            raise ValueError(f"the images of a video take more than {limits.max_seconds:.0f} s to read")
        pictures.append(_read_picture(file, len(files), limits))
        name, size, first = name_of(file), pictures[-1].shape[:2], pictures[0].shape[:2]
        if size != first:
            raise ValueError(
                f"{name} has {size[1]} x {size[0]} pixels, and the first frame of its video {first[1]} x {first[0]}: "
                "resize the images to one size"
            )
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return frames, VideoMetadata(total_num_frames=len(files), frames_indices=list(range(len(files))))


def _read_picture(file: VideoFile, num_frames: int, limits: VideoLimits) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    name = name_of(file)
    source, size = open_source(file, name, limits, "image")
    try:
        limits.check(name, "bytes", size, limits.max_bytes)
        try:
            picture = Image.open(source, formats=PICTURES)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"{name} is no {', '.join(PICTURES)} file: a list of frames holds images") from error
        with picture:
            num_pixels = picture.width * picture.height
            limits.check(name, "pixels", num_pixels, limits.max_pixels)
            limits.check(name, "bytes in all frames", 3 * num_pixels * num_frames, limits.max_memory)
            try:
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{name} is cut off or damaged: copy or download it again") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more pixels than are allowed: {error}") from error
    finally:
        if source is not file and hasattr(source, "close"):
            source.close()
