"""What inputs that a stranger wrote may name."""

import asyncio
from pathlib import Path

from ...video.sources import MediaSources


def stranger_sources(source: str) -> MediaSources:
    """What inputs of a source may name when a stranger wrote them: public hosts, and files of the inputs' folder."""
    path = Path(source)
    folder = path.parent if path.is_file() else path
    return MediaSources(folder if folder.is_dir() else None)


def allowed_video(video: str | bytes, sources: MediaSources) -> bytes:
    """
    The content of a video that an input names, read here so that nothing else is opened and all limits hold.

    Args:
        video: Path, URL or the file's bytes.
        sources: What may be read.

    Raises:
        ValueError: If it may not be read, or can't be.
    """
    if not isinstance(video, str):
        return video
    if "://" not in video and not video.startswith("data:"):
        video = str(Path(video).absolute())
    with asyncio.run(sources.open(video)) as file:
        return file.read()
