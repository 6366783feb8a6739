"""How many tokens a frame of LLaVA-Video has, and where its newlines stand."""

import math
from dataclasses import dataclass


POOL_MODES = ("bilinear", "average", "max")
# One newline behind the video, or one behind every row of every frame.
NEWLINE_LAYOUTS = ONE_TOKEN, GRID = ("one_token", "grid")


@dataclass(frozen=True)
class VideoLayout:
    """
    From a frame's patches to its tokens.

    Attributes:
        patch_side: Patches along a side.
        pool_mode, stride, newline_layout: As in [`HoliTomLlavaVideoConfig`].

    Raises:
        ValueError: If one of them is none of those that there are.
    """

    patch_side: int
    pool_mode: str
    stride: int
    newline_layout: str

    def __post_init__(self):
        for name, value, choices in (
            ("spatial_pool_mode", self.pool_mode, POOL_MODES),
            ("newline_layout", self.newline_layout, NEWLINE_LAYOUTS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not isinstance(self.stride, int) or not 1 <= self.stride <= self.patch_side:
            raise ValueError(
                f"spatial_pool_stride must be an integer from 1 to {self.patch_side}, got {self.stride!r}"
            )

    @property
    def side(self) -> int:
        """Tokens along a side: as many as begin there with `"bilinear"`, as many as fit with the others."""
        exact = self.patch_side / self.stride
        return math.ceil(exact) if self.pool_mode == "bilinear" else math.floor(exact)

    @property
    def tokens_per_frame(self) -> int:
        """T, without newlines."""
        return self.side**2

    def num_newlines(self, num_frames: int) -> int:
        """Newlines of an uncompressed video."""
        return num_frames * self.side if self.newline_layout == GRID else 1

    def num_tokens(self, num_frames: int) -> int:
        """Tokens of an uncompressed video, newlines among them: its placeholders."""
        return num_frames * self.tokens_per_frame + self.num_newlines(num_frames)
