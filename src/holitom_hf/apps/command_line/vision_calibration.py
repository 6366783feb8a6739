"""`holitom-hf calibrate-vision`: thresholds of a vision tower that merges what is alike."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ...bundled import BUNDLED_NAME
from .options import Device, Dtype, Frames, ManyValues, Model, Preset, find_model, one_line_errors, progress_bar, quiet


app = typer.Typer()


@app.command("calibrate-vision", cls=ManyValues)
def calibrate_vision(
    out: Annotated[Path, typer.Argument(help="Folder for holitom_config.json, which --preset takes.")],
    videos: Annotated[list[Path] | None, typer.Option(help="Video files; default: drawn clips to train by.")] = None,
    vision_retention_ratio: Annotated[
        float, typer.Option(help="Share of the patches to leave on average, 0 < R <= 1.")
    ] = 0.5,
    vision_reuse_layer: Annotated[int, typer.Option(min=1, help="Layers of the tower that merge nothing.")] = 1,
    num_questions: Annotated[int, typer.Option(min=1, help="Size of the set that is drawn.")] = 48,
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    frames: Frames = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Finds the thresholds by which a vision tower merges patches (DyMU), and writes settings that have them."""
    with one_line_errors():
        name, hub = find_model(model)
        from ...bundled.questions import write_set

        quiet()
        from ...answering.answerer import Answerer
        from ...answering.vision_calibration import vision_thresholds

        answerer = Answerer(name, preset, device=device, dtype=dtype, hub=hub)
        answerer.load_model()
        with tempfile.TemporaryDirectory() as drawn:
            if videos is None:
                written = write_set(Path(drawn), num_questions, "train", progress=progress_bar("Writing videos"))
                videos = [Path(drawn) / video for video in dict.fromkeys(question.video for question in written)]
            settings = vision_thresholds(answerer, videos, vision_reuse_layer, vision_retention_ratio, frames)
        settings.save_pretrained(out)
        thresholds = ", ".join(f"{threshold:.3f}" for threshold in settings.vision_merge_thresholds)
        print(f"Thresholds of {len(videos)} videos: {thresholds}. Wrote {out}; take it with --preset {out}.")
