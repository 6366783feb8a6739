"""Puts a trained model into the package: `python -m holitom_hf.bundled.training.bundle FOLDER`."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ...bundled import BUNDLED_MODEL


CODE_ENTRIES = ("auto_map", "custom_pipelines")
MAX_BYTES = 12 * 2**20


def bundle(source: Path, target: Path) -> None:
    """
    Copies a checkpoint without the code it carries: inside the package that would be there twice.

    Args:
        source: Folder that `save_pretrained` wrote.
        target: Folder to replace.

    Raises:
        ValueError: If the weights are larger than 12 MiB.
    """
    size = (source / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the weights take {size / 2**20:.1f} MiB; at most {MAX_BYTES / 2**20:.0f} may be bundled")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            text = json.dumps(_without_code(content), indent=2, ensure_ascii=False)
            (target / file.name).write_text(text + "\n", encoding="utf-8")
        elif file.suffix in (".safetensors", ".jinja"):
            shutil.copyfile(file, target / file.name)


def _without_code(content):
    if not isinstance(content, dict):
        return content
    return {name: _without_code(value) for name, value in content.items() if name not in CODE_ENTRIES}


def main(
    folder: Annotated[Path, typer.Argument(help="What the training command wrote into.")],
    target: Annotated[Path, typer.Option(help="Folder to replace.")] = BUNDLED_MODEL,
) -> None:
    """Replaces the bundled model, or another one, and the log of its training."""
    bundle(folder / "model", target)
    log = Path(__file__) if target == BUNDLED_MODEL else target / "log.jsonl"
    shutil.copyfile(folder / "log.jsonl", log.with_name("log.jsonl"))
    typer.echo(f"Wrote {target}.")


if __name__ == "__main__":
    typer.run(main)
