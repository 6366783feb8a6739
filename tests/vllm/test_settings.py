"""What needs no engine: settings, counts, names, and telling vLLM of the models."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from transformers import LlavaOnevisionConfig

from holitom_hf import HoliTomConfig
from holitom_hf import vllm as room
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.merging.vision_methods import VISION_METHODS
from holitom_hf.models.registry import backbones
from holitom_hf.vllm.expert_weights import published_experts
from holitom_hf.vllm.settings import (
    check_asked,
    checkpoint_settings,
    engine_settings,
    may_need_importance,
    num_placeholders,
    request_settings,
)
from holitom_hf.vllm.weight_names import published_name


def test_counts_follow_from_sizes_and_the_rate_alone():
    settings, _ = engine_settings(HoliTomConfig(retention_ratio=0.15), keeps_positions=False)
    assert num_placeholders(settings, 32, 196) == 941 + 1  # 0.15 * 6272 = 940.8
    assert num_placeholders(request_settings(settings, {"retention_ratio": 0.1}), 32, 196) == 627 + 1
    assert num_placeholders(request_settings(settings, {"retention_ratio": 1}), 32, 196) == 6272 + 1
    assert request_settings(settings, {"fps": 2}) == settings


@pytest.mark.parametrize(("ratio", "error"), [(0, ValueError), (1.5, ValueError), ("much", TypeError)])
def test_a_rate_that_is_none_is_an_error_that_names_it(ratio, error):
    with pytest.raises(error, match="retention_ratio"):
        request_settings(HoliTomConfig(), {"retention_ratio": ratio})


@pytest.mark.parametrize("ratio", [1.0, 0.15])
def test_importance_is_asked_for_if_any_rate_needs_it(ratio):
    assert may_need_importance(HoliTomConfig(retention_ratio=ratio))
    assert not may_need_importance(HoliTomConfig(retention_ratio=ratio, outer_method="farthest_points"))
    assert not may_need_importance(HoliTomConfig(retention_ratio=ratio, outer_method="none"))


def test_what_an_engine_has_no_place_for_is_off_and_said():
    asked = HoliTomConfig(inner_merge_layer=3, proportional_attention=True, vision_reuse_layer=2, position_ids="kept")
    settings, left_out = engine_settings(asked, keeps_positions=False)
    assert settings.exact_budget
    assert settings.position_ids == "packed"
    assert not settings.has_inner_stage
    assert not settings.proportional_attention
    assert len(left_out) == 3
    assert engine_settings(settings, keeps_positions=False) == (settings, [])
    assert engine_settings(asked, keeps_positions=True)[0].position_ids == "kept"


def test_positions_that_a_model_keeps_in_any_case_are_not_said_to_be_left_out():
    asked = HoliTomConfig(inner_method="none", position_ids="packed")
    in_force = asked.overlaid({"exact_budget": True, "position_ids": "kept"})
    assert engine_settings(asked, keeps_positions=True) == (in_force, [])
    check_asked(asked, "auto", keeps_positions=True)
    check_asked(None, "auto", keeps_positions=True)
    with pytest.raises(ValueError, match="kept positions"):
        check_asked(in_force, "auto", keeps_positions=False)
    with pytest.raises(ValueError, match=r"stage 3.*a file of settings without it"):
        check_asked(HoliTomConfig(), "auto", keeps_positions=True)


def test_of_what_a_tower_leaves_out_the_engine_has_reuse_and_not_in_every_tower():
    asked = HoliTomConfig(inner_method="none", vision_reuse_layer=2)
    assert engine_settings(asked, keeps_positions=False) == (asked.overlaid({"exact_budget": True}), [])
    others = [method for method in VISION_METHODS if method != "reuse"]
    assert others
    for fields, keeps_positions in [*(({"vision_method": method}, False) for method in others), ({}, True)]:
        kept_as_asked = asked.overlaid(fields | {"position_ids": "kept" if keeps_positions else "packed"})
        settings, left_out = engine_settings(kept_as_asked, keeps_positions)
        assert not settings.has_vision_stage
        assert len(left_out) == 1


@pytest.mark.parametrize("fields", [{"outer_method": "question_tokens"}, {"newline_position": "row"}])
def test_what_can_not_be_served_is_an_error(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        engine_settings(HoliTomConfig(**fields), keeps_positions=False)


def test_overrides_lie_over_the_settings_of_the_checkpoint():
    config = LlavaOnevisionConfig()  # an engine without remote code has upstream's
    of_file = checkpoint_settings(config, str(BUNDLED_MODEL))
    assert of_file.inner_merge_layer == 5  # not the default
    config.holitom_config = {"retention_ratio": 0.3}
    assert checkpoint_settings(config, str(BUNDLED_MODEL)) == of_file.overlaid({"retention_ratio": 0.3})
    config.holitom_config = HoliTomConfig(retention_ratio=0.2)
    assert checkpoint_settings(config, str(BUNDLED_MODEL)).inner_merge_layer == 18


@pytest.mark.parametrize("prefix", ["", "model."])
def test_both_names_of_the_tower_are_the_published_one(prefix):
    published = f"{prefix}vision_tower.vision_model.encoder.layers.0.layer_norm1.bias"
    assert published_name(published.replace("vision_model.", "")) == published
    assert published_name(published) == published
    assert published_name("language_model.model.norm.weight") == "language_model.model.norm.weight"


@pytest.mark.parametrize(("name", "shape"), [("gate_up_proj", (2, 8, 24)), ("down_proj", (2, 12, 8))])
def test_experts_of_both_layouts_are_the_published_ones(name, shape):
    published = torch.rand(shape)
    for weight in (published, published.transpose(1, 2)):
        assert torch.equal(published_experts(f"model.layers.0.mlp.experts.{name}", weight, hidden_size=8), published)
    other = torch.rand(5, 8, 3)
    for name_of_other in (f"model.layers.0.mlp.{name}", f"model.layers.0.mlp.experts.{name}_scale", "lm_head.weight"):
        assert published_experts(name_of_other, other, hidden_size=4) is other


def test_classes_are_called_as_those_of_transformers():
    assert set(room.ARCHITECTURES) <= {backbone.generation for backbone in backbones().values()}


class Registry:
    """As much of vLLM's as the plugin uses."""

    def __init__(self):
        self.registered = []

    def get_supported_archs(self):
        return [name for name, _ in self.registered]

    def register_model(self, name, place):
        self.registered.append((name, place))


@pytest.mark.skipif("'vllm' in sys.modules", reason="takes the place of vLLM")
def test_models_are_registered_once_however_often_it_is_asked_for(monkeypatch):
    registry, configs = Registry(), {}
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    checkpoint = ModuleType("holitom_hf.vllm.checkpoint")
    for name in ("HoliTomModelConfig", "PruningModelConfig", "HybridModelConfig"):
        setattr(checkpoint, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, checkpoint.__name__, checkpoint)
    sys.modules["vllm"].ModelRegistry = registry
    module.MODELS_CONFIG_MAP = configs
    room.register()
    room.register()
    assert [name for name, _ in registry.registered] == list(room.ARCHITECTURES) == list(configs)
    assert registry.registered[0][1] == (
        "holitom_hf.vllm.llava_onevision:HoliTomLlavaOnevisionForConditionalGeneration"
    )


@pytest.mark.skipif("'vllm' in sys.modules", reason="vLLM is there")
def test_without_vllm_nothing_is_registered(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    room.register()
    assert "vllm" not in sys.modules
