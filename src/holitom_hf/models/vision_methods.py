"""What a SigLIP tower does with a video under each name in [`VISION_METHODS`]: the one list of encoders."""

from ..merging.package import of_package
from ..merging.vision_methods import DYMU, FRAMES, REUSE, TOME
from .siglip import HoliTomSiglipVisionModel


# All take what `HoliTomSiglipVisionModel.encode_changes` takes, the tower first, and return what it returns.
VISION_ENCODERS = {
    REUSE: HoliTomSiglipVisionModel.encode_changes,
    FRAMES: of_package("models.siglip_frames", "encode_merged_frames"),
    TOME: of_package("models.siglip_tome", "encode_merged_patches"),
    DYMU: of_package("models.siglip_dymu", "encode_by_thresholds"),
}
