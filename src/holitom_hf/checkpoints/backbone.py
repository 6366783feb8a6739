"""What the classes of a backbone are called: in its folder of the package, and in the checkpoints that carry it."""

from dataclasses import dataclass


# The modules that transformers' Auto classes and pipelines look into, as they are called in every checkpoint.
ENTRIES = CONFIGURATION, MODELING, PROCESSING, PIPELINE = tuple(
    f"{name}_holitom" for name in ("configuration", "modeling", "processing", "pipeline")
)
PIPELINE_CLASS = "VideoTextToTextPipeline"
PIPELINE_TASK = "video-text-to-text"


@dataclass(frozen=True)
class Backbone:
    """
    The names of one family of models.

    Attributes:
        model_type: Of its configuration, and of its folder in `models/`.
        title: What people call it.
        config: Class in `configuration.py`.
        model: Class in `modeling.py`, without a language-modelling head.
        generation: Class in `modeling.py`, with one.
        processor: Class in `processing.py`.
        video_processor: Class in `processing.py`.
        upstream_processor: The processor's class without this package.
        has_upstream: Whether transformers has a class of the model, with which a checkpoint loads without its code.
        fixed_settings: Compression settings that have their default value alone with these models.
        keeps_positions: Whether tokens stand where they stood uncompressed, whatever `position_ids` the settings name.
    """

    model_type: str
    title: str
    config: str
    model: str
    generation: str
    processor: str
    video_processor: str
    upstream_processor: str
    has_upstream: bool = True
    fixed_settings: tuple[str, ...] = ()
    keeps_positions: bool = False

    def auto_map(self) -> dict[str, str]:
        """What a checkpoint's `auto_map` says: which class each Auto class finds in which of its files."""
        return {
            "AutoConfig": f"{CONFIGURATION}.{self.config}",
            "AutoModel": f"{MODELING}.{self.model}",
            "AutoModelForImageTextToText": f"{MODELING}.{self.generation}",
            "AutoModelForMultimodalLM": f"{MODELING}.{self.generation}",
            "AutoProcessor": f"{PROCESSING}.{self.processor}",
            "AutoVideoProcessor": f"{PROCESSING}.{self.video_processor}",
        }

    def custom_pipelines(self) -> dict[str, dict]:
        """What a checkpoint's `custom_pipelines` says."""
        pipeline = {"impl": f"{PIPELINE}.{PIPELINE_CLASS}", "pt": ["AutoModelForMultimodalLM"], "type": "multimodal"}
        return {PIPELINE_TASK: pipeline}
