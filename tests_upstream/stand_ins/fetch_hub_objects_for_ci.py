"""Stands in for a script beside transformers' tests: their example files are made here instead of downloaded."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from holitom_hf.video.encoding import write_video


FOLDER = Path(tempfile.mkdtemp(prefix="upstream-examples-"))


def url_to_local_path(url: str) -> str:
    """A file of the kind that `url` names; of sounds, which our models don't take, only the name."""
    file = FOLDER / url.rsplit("/", 1)[-1]
    if not file.exists():
        if file.suffix == ".mp4":
            # As long as the shortest of theirs, on which counts of sampled frames are based.
            ramp = np.arange(11 * 48 * 64 * 3, dtype=np.uint32).reshape(11, 48, 64, 3)
            write_video(file, (ramp // 97 % 256).astype(np.uint8), fps=30)
        elif file.suffix in (".png", ".jpg", ".jpeg"):
            Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 20).convert("RGB").save(file)
    return str(file)
