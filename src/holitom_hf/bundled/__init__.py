"""The small trained model that comes with the package."""

from pathlib import Path


BUNDLED_NAME = "bundled"
BUNDLED_MODEL = Path(__file__).parent / "model"
BUNDLED_ABOUT = (
    "The bundled model (2 million parameters) knows drawn clips of coloured shapes, as `holitom-hf questions` writes "
    "them: colours, shapes, motion, counts, order, backgrounds, existence, relations and changes. It answers in one "
    "or two words and knows nothing else; pass --model llava-hf/llava-onevision-qwen2-7b-ov-hf for real videos."
)


def model_name(name: str) -> str:
    """The folder of the bundled model for its name, any other name as it is."""
    return str(BUNDLED_MODEL) if name == BUNDLED_NAME else name
