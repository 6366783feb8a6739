"""Operations of LLaVA-Video before its decoder."""

from dataclasses import replace

from ..llava_onevision.operations import encoder_operations as onevision_operations
from ..operations import EncoderOperations


def encoder_operations(config, num_frames: int, *args, **kwargs) -> EncoderOperations:
    """
    What stands before the decoder, for one video: LLaVA-OneVision's, but for the tokens of a frame and the newlines,
    which are those of all rows: a compressed video has none behind rows without a token.

    Args:
        config: [`HoliTomLlavaVideoConfig`].
        num_frames: F.
        args, kwargs: As in LLaVA-OneVision's.
    """
    operations = onevision_operations(config, num_frames, *args, **kwargs)
    return replace(
        operations,
        tokens_per_frame=config.tokens_per_frame,
        num_newlines=config.layout.num_newlines(num_frames),
    )
