"""Operations of LLaVA-Video before its decoder."""

from dataclasses import replace

from ..llava_onevision.operations import encoder_operations as onevision_operations
from ..operations import EncoderOperations
from .layout import GRID


def encoder_operations(config, num_frames: int, *args, **kwargs) -> EncoderOperations:
    """
    What stands before the decoder, for one video: LLaVA-OneVision's, but for the tokens of a frame and the newlines,
    which are those of the uncompressed video.

    Args:
        config: [`HoliTomLlavaVideoConfig`].
        num_frames: F.
        args, kwargs: As in LLaVA-OneVision's.
    """
    operations, layout = onevision_operations(config, num_frames, *args, **kwargs), config.layout
    return replace(
        operations,
        tokens_per_frame=layout.tokens_per_frame,
        num_newlines=layout.num_newlines(num_frames),
        newline_rows=layout.side if layout.newline_layout == GRID else None,
    )
