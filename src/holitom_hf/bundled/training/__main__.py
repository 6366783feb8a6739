"""The training command: `python -m holitom_hf.bundled.training FOLDER`."""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed
import typer

from .llava_onevision import LlavaOnevisionTrainer
from .qwen3_vl import Qwen3VLTrainer


TRAINERS = {"llava_onevision": LlavaOnevisionTrainer, "qwen3_vl": Qwen3VLTrainer}


def main(
    folder: Annotated[Path, typer.Argument(help="For state, log and model; a run that was stopped goes on.")],
    vision_steps: int = 1300,
    answer_steps: int = 4500,
    backbone: Annotated[str, typer.Option(help="llava_onevision or qwen3_vl.")] = "llava_onevision",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Trains the bundled model from nothing, or the small Qwen3-VL from the bundled model."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    trainer = TRAINERS[backbone](folder, vision_steps, answer_steps, device)
    trainer.load()
    if trainer.phase == "vision":
        trainer.train_vision()
    trainer.train_answers()


if __name__ == "__main__":
    typer.run(main)
