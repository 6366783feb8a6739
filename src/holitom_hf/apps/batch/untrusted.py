"""What inputs that a stranger wrote may name."""

from pathlib import Path


def allowed_video(video: str | bytes, folder: Path) -> str | bytes:
    """
    A video of an input that is not trusted, to be opened.

    Args:
        video: Path, URL or the file's bytes.
        folder: The only one, with those in it, whose files may be read.

    Raises:
        ValueError: If it is a file elsewhere, also by a link, no plain file, or a URL that may not be read.
    """
    if not isinstance(video, str) or video.startswith("data:"):
        return video
    if "://" in video:
        raise ValueError(f"{video!r} is a URL: with --untrusted none is read")
    path, folder = Path(video).resolve(), Path(folder).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{video!r} lies outside of the inputs' folder: with --untrusted no such file is read")
    if path.exists() and not path.is_file():
        raise ValueError(f"{video!r} is no plain file")
    return str(path)
