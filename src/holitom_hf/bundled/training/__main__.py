"""The training command: `python -m holitom_hf.bundled.training FOLDER`."""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed
import typer

from .trainer import Trainer


def main(
    folder: Annotated[Path, typer.Argument(help="For state, log and model; a run that was stopped goes on.")],
    vision_steps: int = 1300,
    answer_steps: int = 4500,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains the bundled model from nothing."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    trainer = Trainer(folder, vision_steps, answer_steps, device)
    trainer.load()
    if trainer.phase == "vision":
        trainer.train_vision()
    trainer.train_answers()


if __name__ == "__main__":
    typer.run(main)
