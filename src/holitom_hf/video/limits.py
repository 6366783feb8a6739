"""What a video may ask of its reader: what a file claims costs its sender nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoLimits:
    """
    Bounds that are checked before anything of that size is allocated. The defaults hold for bytes and URLs.

    Attributes:
        max_bytes: Of the file.
        max_pixels: Of one frame; 8K is allowed.
        max_frames: That the file may claim, and that may be decoded to get at those asked for.
        max_memory: Bytes of all frames asked for, at the video's size.
        max_seconds: For download and decoding, each.
    """

    max_bytes: float = 2**32
    max_pixels: int = 8192 * 4320
    max_frames: int = 2**20
    max_memory: float = 2**32
    max_seconds: float = 600.0

    def check(self, name: str, what: str, value: float, limit: float) -> None:
        """Raises a `ValueError` if the video called `name` has more of something than the limit."""
        if value > limit:
            raise ValueError(f"{name} has {value} {what}, more than the {limit:.0f} that are allowed")

    def check_header(self, name: str, file, size: int) -> None:
        """
        Raises a `ValueError` if an MP4 header claims more samples than there can be: FFmpeg allocates for each of
        them when it opens a file, though one number may stand for all.
        """
        todo, num_boxes, tracks = [(0, size)], 0, [[b"", True, 0]]  # handler, whether by chunk, samples
        while todo:
            start, end = todo.pop()
            file.seek(start)
            head = file.read(32)
            length, box, skip = int.from_bytes(head[:4], "big"), head[4:8], 8
            if start == 0 and box not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
                return
            if length == 1:
                length, skip = int.from_bytes(head[8:16], "big"), 16
            length = length or end - start
            if length < skip:
                continue
            num_boxes += 1
            self.check(name, "boxes", num_boxes, self.max_frames)
            if start + length + 8 <= end:
                todo.append((start + length, end))
            if box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"):
                todo.append((start + skip, min(start + length, end)))
            first, second, third = (int.from_bytes(head[skip + at :][:4], "big") for at in (4, 8, 12))
            if box == b"trak":
                tracks.append([b"", True, 0])
            elif box == b"hdlr" and head[skip + 8 : skip + 12] in (b"soun", b"vide"):
                tracks[-1][0] = head[skip + 8 : skip + 12]
            elif box == b"stts":
                tracks[-1][1] &= first == third == 1
            elif box in (b"stsz", b"trun"):
                tracks[-1][2] += second if box == b"stsz" else first
            elif box == b"cmov":
                raise ValueError(f"{name} has a compressed header: re-encode it")
        # Of sound without compression each sample counts, but FFmpeg takes it by chunks.
        total = sum(count for kind, by_chunk, count in tracks if not (kind == b"soun" and by_chunk))
        # Sound has samples, too: more a second than there are frames.
        self.check(name, "samples by its header", total, 4 * self.max_frames)


# Of files on this machine, whose owner has them to be read: what no video has.
LOCAL_LIMITS = VideoLimits(float("inf"), 2**27, 10**7, 2**34, float("inf"))

# FFmpeg's containers that hold a video and never name another file or address to open.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,gif,apng,mpeg,mpegts,mpegvideo,ogg,asf,wtv,mxf,nut,ivf,"
    "av1,obu,h264,hevc,vvc,m4v,mjpeg,vc1,dv,rm,yuv4mpegpipe"
)

# Pillow's formats that hold a picture and run nothing.
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
