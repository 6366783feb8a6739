"""
An OpenAI-compatible server: transformers' own (`transformers serve`) for one model of ours.

`transformers serve --trust-remote-code` loads such a checkpoint, but then looks up what it takes by the name of its
class in a list of its own, and answers every request with "Unknown modality". That question is answered here.
"""

from fastapi import FastAPI
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from ..answering.answerer import Answerer
from ..models.generation import HoliTomGenerationMixin


class HoliTomModelManager(ModelManager):
    """Serves one loaded model under one name."""

    def __init__(self, answerer: Answerer, name: str):
        """
        Args:
            answerer: With its weights loaded.
            name: What requests call it.
        """
        super().__init__()
        self.answerer, self.force_model = answerer, name

    def load_model_and_processor(self, model_id_and_revision: str, **kwargs):
        """Overrides ModelManager.load_model_and_processor: they are there already."""
        return self.answerer.model, self.answerer.processor

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        """Overrides ModelManager.get_model_modality, which knows upstream's classes only."""
        if isinstance(model, HoliTomGenerationMixin):
            return Modality.VLM
        return ModelManager.get_model_modality(model, processor)


def build_app(answerer: Answerer, name: str, num_frames: int | None = None) -> FastAPI:
    """
    The server's application, with the endpoints of `transformers serve`.

    Args:
        answerer: With its weights loaded.
        name: What requests call the model.
        num_frames: Frames to take of each video; `None`: at most the processor's.
    """
    manager, state = HoliTomModelManager(answerer, name), GenerationState()
    # Upstream asks every processor for 32 frames; ours would refuse a shorter video then.
    template = {"num_frames": num_frames}
    return build_server(
        manager,
        ChatCompletionHandler(manager, state, template),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state, template),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state, template),
        generation_state=state,
    )
