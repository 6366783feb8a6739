"""What the commands of `holitom-hf` share: options, errors, progress."""

import contextlib
import sys
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from typer.core import TyperCommand

from ...bundled import model_name
from ...presets import preset_files


MODEL_HELP = "Folder or Hub repository of a model of any supported family, or bundled: a small one for drawn clips."
PRESET_HELP = f"Settings in place of the model's: a JSON file of them, or one of {', '.join(sorted(preset_files()))}."
# Options that several commands have.
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Preset = Annotated[str | None, typer.Option(help=PRESET_HELP)]
RetentionRatio = Annotated[float | None, typer.Option(help="Share of visual tokens to keep, 0 < R <= 1.")]
Frames = Annotated[int | None, typer.Option(help="Frames to take; default: at most what the model's processor says.")]
Fps = Annotated[float | None, typer.Option(help="Frames to take for each second, in place of --frames.")]
MinPixels = Annotated[int | None, typer.Option(min=1, help="Qwen-VL: fewest pixels, of what --max-pixels says.")]
MaxPixels = Annotated[
    int | None, typer.Option(min=1, help="Qwen2.5-VL: most pixels of a frame; later ones: of all frames together.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto to spread the layers.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]


class ManyValues(TyperCommand):
    """A command whose list options take their values behind each other: `--ratios 0.2 0.1`."""

    def parse_args(self, ctx, args):
        """Overrides click.Command.parse_args: the option's name is repeated before every value."""
        many = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated, current = [], None
        for argument in args:
            if argument.startswith("--"):
                current, is_first = (argument if argument in many else None), True
            elif current is not None and not is_first:
                repeated.append(current)
            else:
                is_first = False
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


@contextlib.contextmanager
def one_line_errors():
    """What a caller may have got wrong becomes one line on stderr and exit code 1."""
    from huggingface_hub.errors import StrictDataclassError  # of a field of config.json

    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, StrictDataclassError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


def find_model(model: str) -> tuple[str, dict]:
    """
    Folder or Hub repository that `--model` means, and the options to load it with. To be called before anything that
    imports torch, which takes longer than to hear that there is no such model.
    """
    from ...checkpoints.hub import hub_options

    name = model_name(model)
    return name, hub_options(name)


def check_sampling(frames: int | None, fps: float | None, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raises a `ValueError` if options of how a video is read exclude each other, whatever model reads it."""
    if frames is not None and fps is not None:
        raise ValueError("--frames and --fps exclude each other: give one of them")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise ValueError(f"--min-pixels {min_pixels} is more than --max-pixels {max_pixels}")


def settings_of(preset: str | None, retention_ratio: float | None):
    """The settings that the options ask for, or `None` for the checkpoint's own."""
    from ...configuration import HoliTomConfig

    settings = HoliTomConfig.coerce(preset) if preset is not None else None
    if settings is not None and retention_ratio is not None:
        settings = replace(settings, retention_ratio=retention_ratio)
    return settings


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress_bar(text: str):
    """Wraps an iterable in a progress bar on stderr."""
    return lambda items: track(items, text, console=Console(stderr=True))
