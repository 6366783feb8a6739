"""What one request may ask of the server."""

from dataclasses import dataclass

from ...video.limits import VideoLimits


@dataclass(frozen=True)
class ServingLimits:
    """
    Each is answered by a 4xx that says so.

    Attributes:
        max_body_bytes: Of a request; videos in `data` URLs are part of it.
        max_media_bytes: Of one downloaded video or picture.
        max_fetch_seconds: Of one download.
        max_decode_seconds: Of one video.
        max_pixels: Of one frame or picture; 4K is allowed.
        max_video_frames: That a video may have.
        max_frames: That may be taken of one video.
        max_memory: Bytes of all decoded frames of a request.
        max_videos: Videos and pictures of a request.
        max_prompt_tokens: Of a request, videos uncompressed.
        max_new_tokens: Of an answer.
        max_queue: Requests that are being read, prepared, answered or waiting.
        max_seconds: From a request's first byte to the end of its answer.
    """

    max_body_bytes: int = 2**26
    max_media_bytes: int = 2**28
    max_fetch_seconds: float = 60.0
    max_decode_seconds: float = 60.0
    max_pixels: int = 4096 * 2304
    max_video_frames: int = 2**20
    max_frames: int = 128
    max_memory: int = 2**30
    max_videos: int = 4
    max_prompt_tokens: int = 32768
    max_new_tokens: int = 2048
    max_queue: int = 64
    max_seconds: float = 300.0

    def of_video(self, num_videos: int) -> VideoLimits:
        """Of each video where a request has several."""
        return VideoLimits(
            max_bytes=self.max_media_bytes,
            max_pixels=self.max_pixels,
            max_frames=self.max_video_frames,
            max_memory=self.max_memory // max(1, num_videos),
            max_seconds=self.max_decode_seconds,
        )
