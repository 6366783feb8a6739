"""transformers' own registries and signatures, read the way transformers reads them."""

import inspect
import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    pipeline,
)

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor
from holitom_hf.models.qwen_vl.positions import QwenPositionsMixin
from holitom_hf.models.registry import backbone_class, backbones

from ..conftest import SMALL


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_transformers_own_pipelines_take_the_model_to_be_supported(task):
    processor = tiny_processor(side=32, patch=4)
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers.pipelines.base")
    logger.addHandler(handler)
    try:
        pipe = pipeline(task, model=tiny_model(processor.tokenizer), processor=processor)
    finally:
        logger.removeHandler(handler)
    assert type(pipe.model) is HoliTomLlavaOnevisionForConditionalGeneration
    assert not [record.getMessage() for record in records if "is not supported" in record.getMessage()]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_a_configuration_of_ours_makes_a_model_of_ours_and_upstreams_one_of_upstreams(auto, model):
    assert type(auto.from_config(model.config)) is HoliTomLlavaOnevisionForConditionalGeneration
    assert type(auto.from_config(LlavaOnevisionConfig(**SMALL))) is LlavaOnevisionForConditionalGeneration


def test_a_backbone_says_that_its_model_keeps_positions():
    found = {
        backbone.title: issubclass(backbone_class(backbone, "model"), QwenPositionsMixin)
        for backbone in backbones().values()
    }
    assert found == {backbone.title: backbone.keeps_positions for backbone in backbones().values()}
    assert set(found.values()) == {False, True}


def test_what_a_processor_takes_is_annotated_as_upstreams_is():
    ours, theirs = (inspect.signature(cls.__call__).parameters for cls in (HoliTomProcessor, LlavaOnevisionProcessor))
    assert list(ours) == list(theirs)
    assert [str(ours[name].annotation) for name in ours] == [str(theirs[name].annotation) for name in theirs]


@pytest.mark.parametrize(("return_tensors", "kind"), [("np", np.ndarray), ("pt", torch.Tensor)])
def test_videos_of_different_length_come_as_a_list_of_what_was_asked_for(return_tensors, kind):
    processor = tiny_processor(side=32, patch=4)
    videos = [np.random.default_rng(n).integers(0, 256, (n, 48, 64, 3), dtype=np.uint8) for n in (2, 3)]
    found = processor(text="<video> <video>", videos=videos, return_tensors=return_tensors)["pixel_values_videos"]
    assert [video.shape for video in found] == [(2, 3, 32, 32), (3, 3, 32, 32)]
    for one, video in zip(found, videos):
        alone = processor(text="<video>", videos=video, return_tensors=return_tensors)["pixel_values_videos"]
        assert type(one) is type(alone) is kind
        assert (one == alone[0]).all()
