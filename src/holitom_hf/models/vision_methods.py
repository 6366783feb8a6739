"""What a SigLIP tower does with a video under each name in [`VISION_METHODS`]: the one list of encoders."""

from ..merging.vision_methods import FRAMES, REUSE, TOME
from .siglip import HoliTomSiglipVisionModel
from .siglip_frames import encode_merged_frames
from .siglip_tome import encode_merged_patches


# All take what `HoliTomSiglipVisionModel.encode_changes` takes, the tower first, and return what it returns.
VISION_ENCODERS = {
    REUSE: HoliTomSiglipVisionModel.encode_changes,
    FRAMES: encode_merged_frames,
    TOME: encode_merged_patches,
}
