"""The command `calibrate`: settings that are found on a few videos."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...bundled import BUNDLED_NAME
from .options import Device, Dtype, Model, Preset, RetentionRatio, find_model, one_line_errors, quiet, settings_of


app = typer.Typer()


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="JSON file of settings to write, for --preset and holitom_config.")],
    method: Annotated[str, typer.Option(help="What visual tokens leave out: skip_ffn, skip_attention or freeze.")],
    layers: Annotated[int, typer.Option(min=1, help="In how many layers.")],
    model: Model = BUNDLED_NAME,
    questions: Annotated[
        Path | None, typer.Option(help="A set of questions; default: one drawn of the split validation.")
    ] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="How many of its first questions are asked.")] = 16,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Finds the layers of the decoder that visual tokens miss least, and writes settings with them."""
    with one_line_errors():
        from ...merging.inner import SKIP_METHODS
        from ...merging.settings import check_choice

        check_choice("calibrate", "--method", method, SKIP_METHODS)
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        quiet()
        from ...answering.answerer import Answerer
        from ...answering.calibration import find_skipped_layers
        from ...bundled.questions import read_set, write_set

        answerer = Answerer(name, settings, retention_ratio, device=device, dtype=dtype, hub=hub)
        answerer.load_model()
        own = replace(answerer.config.holitom_config, inner_method=method, skipped_layers=None)
        with tempfile.TemporaryDirectory() as drawn:
            folder = questions or Path(drawn)
            if questions is None:
                write_set(folder, num_questions, "validation")
            asked = read_set(folder)[:num_questions]
            prepared = []
            for question in asked:
                prepared.append(answerer.prepare(str(folder / question.video), question.text, question.num_frames))
                answerer.encode(prepared[-1])
        print(f"{len(prepared)} questions, {method} in {layers} layers. Layer, and KL divergence of the next token:")
        found = []
        for step in find_skipped_layers(answerer, prepared, own, layers):
            found.append(step.layer)
            print(f"{step.layer:5d}  {step.divergence:.3e} nats with {found}", flush=True)
        written = replace(own, skipped_layers=found).to_dict()
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        beside.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, out)
        print(f"Wrote {out}.")
