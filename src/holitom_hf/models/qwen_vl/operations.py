"""Operations of the Qwen-VL families before their decoders."""

from ...merging.products import segmentation_flops
from ..operations import EncoderOperations
from .reuse import check_reuse


USUAL_SIZE = 14  # tokens on each side of a frame, where no size is asked for


def encoder_operations(
    config, num_frames: int, size: tuple[int, int] | None = None, settings=None, computed_share: float = 1.0
) -> EncoderOperations:
    """
    What stands before the decoder, for one video.

    Args:
        config: Of Qwen2.5-VL, or Qwen3-VL and those after it.
        num_frames: Frames of the video, of which `temporal_patch_size` make one that the method sees.
        size: Height and width that frames are resized to, in pixels; `None`: of 14 x 14 tokens.
        settings: [`HoliTomConfig`]; default: the config's.
        computed_share: Of the patches that the vision tower computes after `vision_reuse_layer`, where that is set:
            the same of every window's, in whole squares.

    Raises:
        ValueError: If a side is no multiple of the square of patches that makes a token, or the tower can't leave out
            what the settings say.
    """
    settings, vision = settings or config.holitom_config, config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    size = (USUAL_SIZE * unit, USUAL_SIZE * unit) if size is None else size
    if any(side % unit or side < unit for side in size):
        raise ValueError(f"frames of {config.backbone.title} have sides that are multiples of {unit}, got {size}")
    height, width = (side // vision.patch_size for side in size)
    temporal = -(-num_frames // vision.temporal_patch_size)
    patches, tokens = height * width, height * width // vision.spatial_merge_size**2
    dim = vision.hidden_size

    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    gates = 3 if hasattr(vision, "fullatt_block_indexes") else 2  # matrices of a block's MLP
    tower, decision, share = temporal * 2 * patches * pixels * dim, 0.0, 1.0
    if settings.has_vision_stage:
        check_reuse(config, settings)
        decision = segmentation_flops(temporal, patches, dim)
    for block in range(vision.depth):
        if block == settings.vision_reuse_layer:
            share = computed_share
        attended = _attended(vision, height, width, block)
        matrices = 2 * patches * (4 * dim**2 + gates * dim * vision.intermediate_size)
        tower += share * temporal * (matrices + 4 * attended * dim)
    merged = dim * vision.spatial_merge_size**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return EncoderOperations(
        num_frames=temporal,
        tokens_per_frame=tokens,
        num_newlines=0,
        key_dim=dim // vision.num_heads,
        vision_tower=float(tower + decision),
        projector=float(share * temporal * mergers * 2 * tokens * (merged**2 + merged * vision.out_hidden_size)),
        importance=float(temporal * (share * 2 * patches * 3 * dim**2 + 2 * patches**2 * dim)),
    )


def _attended(vision, height: int, width: int, block: int) -> int:
    """Pairs of patches that attend to each other in a block: of the whole, or window by window."""
    if block in getattr(vision, "fullatt_block_indexes", range(vision.depth)):
        return (height * width) ** 2
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([min(side, length - start) for start in range(0, length, side)] for length in (height, width))
    return sum(row**2 for row in rows) * sum(column**2 for column in columns)
