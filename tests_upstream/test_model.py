"""Upstream's checks of models, with a tester whose inputs are real videos."""

import copy
import unittest

import torch
from upstream_tests.generation.test_utils import GenerationTesterMixin
from upstream_tests.test_configuration_common import ConfigTester
from upstream_tests.test_modeling_common import ModelTesterMixin

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
)
from tests import conftest
from tests.conftest import IDENTITY, SIDE, SMALL, TOKENS_PER_FRAME, make_prompt, make_video


IMAGE_TOKEN, VIDEO_TOKEN = 1, 2


class VideoTester:
    """Prompts with a video each, none of which are alike."""

    batch_size, num_frames, num_text = 3, 4, 6
    seq_length = encoder_seq_length = num_frames * TOKENS_PER_FRAME + 1 + num_text
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, settings: HoliTomConfig):
        self.settings = settings

    def get_config(self) -> HoliTomLlavaOnevisionConfig:
        config = copy.deepcopy(SMALL)
        config["text_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 2
        # Low numbers, which a smaller vocabulary leaves alone.
        config |= {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN}
        return HoliTomLlavaOnevisionConfig(**config, holitom_config=copy.deepcopy(self.settings))

    def prepare_config_and_inputs_for_common(self):
        seeds = range(self.batch_size)
        input_ids = torch.stack([make_prompt(2, f"video:{self.num_frames}", 4, seed=seed) for seed in seeds])
        input_ids = input_ids.masked_fill(input_ids == conftest.VIDEO_TOKEN, VIDEO_TOKEN)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.stack([make_video(self.num_frames, seed=seed) for seed in seeds]),
        }


class ModelChecks(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (HoliTomLlavaOnevisionModel, HoliTomLlavaOnevisionForConditionalGeneration)
    _is_composite = True
    # One row of the tower's output is a frame or a patch, not a video or an image.
    skip_test_video_features_output_shape = skip_test_image_features_output_shape = True
    # As in upstream's class, the tower's last norm is behind what is projected.
    test_all_params_have_gradient = False

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Overrides ModelTesterMixin._prepare_for_class, which knows classes that get labels by upstream's names."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is HoliTomLlavaOnevisionForConditionalGeneration:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def _image_features_prepare_config_and_inputs(self):
        """Overrides ModelTesterMixin's, which takes images from the tester's inputs: there are none among these."""
        pixels = torch.randn(self.model_tester.batch_size, 2, 3, SIDE, SIDE)
        sizes = torch.full((self.model_tester.batch_size, 2), SIDE)
        return self.model_tester.get_config(), {"pixel_values": pixels, "image_sizes": sizes}

    def only_with_a_loss(self):
        """Upstream knows by the names of its own classes which have none."""
        self.all_model_classes = (HoliTomLlavaOnevisionForConditionalGeneration,)

    def test_training(self):
        self.only_with_a_loss()
        super().test_training()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.only_with_a_loss()
        super().check_training_gradient_checkpointing(*args, **kwargs)


class TestOff(ModelChecks, unittest.TestCase):
    """Nothing is compressed."""

    def setUp(self):
        self.model_tester = VideoTester(IDENTITY)
        self.config_tester = ConfigTester(
            self, config_class=HoliTomLlavaOnevisionConfig, has_text_modality=False, common_properties=[]
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class TestAllStages(ModelChecks, unittest.TestCase):
    """All three stages. Rows are of one length: upstream compares those of a batch from their start on."""

    def setUp(self):
        self.model_tester = VideoTester(HoliTomConfig(retention_ratio=0.3, inner_merge_layer=1, exact_budget=True))
