import json
import re

import pytest
from transformers import LlavaOnevisionConfig

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig

from .conftest import SMALL


DEFAULTS = {
    "retention_ratio": 0.15,
    "similarity_threshold": 0.80,
    "max_segment_frames": None,
    "cluster_neighbors": 7,
    "cluster_center_weight": 0.6,
    "contextual_ratio": 0.0,
    "inner_merge_layer": 18,
    "inner_merge_ratio": 0.5,
    "outer_method": "holitom",
    "inner_method": "merge",
    "newline_position": "end",
    "base_model_name_or_path": None,
    "base_model_revision": None,
}


def test_the_defaults_are_those_of_the_design():
    assert HoliTomConfig().to_dict() == DEFAULTS


OUT_OF_RANGE = [
    ("retention_ratio", 0, "0 < R <= 1"),
    ("retention_ratio", 1.01, "0 < R <= 1"),
    ("retention_ratio", float("nan"), "0 < R <= 1"),
    ("similarity_threshold", 1.5, "[-1, 1]"),
    ("max_segment_frames", 0, "an integer >= 1 or None"),
    ("cluster_neighbors", 0, "an integer >= 1"),
    ("cluster_center_weight", -0.1, "[0, 1]"),
    ("contextual_ratio", 1.1, "[0, 1]"),
    ("inner_merge_layer", 0, "an integer >= 1 or None"),
    ("inner_merge_ratio", 1.0, "0 <= r < 1"),
    ("outer_method", "fastv", "'visionzip', 'frame_subsampling', 'random_tokens', 'average_pooling', 'none'"),
    ("inner_method", "fold", "'merge', 'prune', 'none'"),
    ("newline_position", "column", "'end', 'row'"),
]
WRONG_TYPE = [
    ("retention_ratio", "0.15", "a number"),
    ("retention_ratio", True, "a number"),
    ("retention_ratio", None, "a number"),
    ("max_segment_frames", 4.0, "an integer >= 1 or None"),
    ("cluster_neighbors", None, "an integer >= 1"),
    ("inner_merge_layer", "18", "an integer >= 1 or None"),
    ("base_model_name_or_path", 7, "a non-empty string or None"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"HoliTomConfig.{field} must be")) as error:
        HoliTomConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG_TYPE)
def test_a_value_of_a_wrong_type_is_named_with_its_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(TypeError, match=re.escape(f"HoliTomConfig.{field} must be")) as error:
        HoliTomConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)


def test_a_bad_value_is_refused_when_assigned_and_changes_nothing():
    config = HoliTomConfig()
    with pytest.raises(ValueError, match=r"retention_ratio must be .* got 2"):
        config.retention_ratio = 2
    with pytest.raises(AttributeError, match="HoliTomConfig has no field 'ratio'"):
        config.ratio = 0.1
    assert config == HoliTomConfig()


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"HoliTomConfig has no field 'tau'; its fields are .*similarity_threshold"):
        HoliTomConfig.from_dict({"tau": 0.8})


def test_json_round_trip(tmp_path):
    config = HoliTomConfig(
        retention_ratio=0.1, similarity_threshold=0.65, inner_merge_layer=None, newline_position="row"
    )
    config.save_pretrained(tmp_path / "settings")
    assert json.loads((tmp_path / "settings" / "holitom_config.json").read_text()) == config.to_dict()
    assert HoliTomConfig.from_pretrained(tmp_path / "settings") == config
    assert HoliTomConfig.from_pretrained(tmp_path / "settings" / "holitom_config.json") == config


def test_a_file_that_is_no_json_object_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"bad\.json is not a JSON file"):
        HoliTomConfig.from_pretrained(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"list\.json must hold one JSON object"):
        HoliTomConfig.from_pretrained(tmp_path / "list.json")
    with pytest.raises(ValueError, match="is a file"):
        HoliTomConfig().save_pretrained(tmp_path / "bad.json")


PAPER = {
    "llava-onevision-7b-r10": {"retention_ratio": 0.10, "similarity_threshold": 0.65},
    "llava-onevision-7b-r15": {"retention_ratio": 0.15},
    "llava-onevision-7b-r20": {"retention_ratio": 0.20},
    "llava-onevision-7b-r25": {"retention_ratio": 0.25},
    "llava-onevision-7b-r10-no-inner": {
        "retention_ratio": 0.10,
        "similarity_threshold": 0.65,
        "inner_merge_layer": None,
    },
    "llava-onevision-7b-r15-no-inner": {"retention_ratio": 0.15, "inner_merge_layer": None},
    "llava-onevision-7b-r20-no-inner": {"retention_ratio": 0.20, "inner_merge_layer": None},
    "llava-onevision-7b-r25-no-inner": {"retention_ratio": 0.25, "inner_merge_layer": None},
    "llava-onevision-72b-r15": {"inner_merge_layer": 60},
    "llava-video-7b-r15": {"newline_position": "row"},
    "llava-onevision-0.5b-r15": {"inner_merge_layer": 15},
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_found_by_name_and_hold_the_papers_settings(name):
    assert HoliTomConfig.from_preset(name) == HoliTomConfig(**PAPER[name])
    assert HoliTomConfig.from_pretrained(HoliTomConfig.presets()[name]) == HoliTomConfig(**PAPER[name])


def test_all_presets_are_tested_and_an_unknown_one_is_answered_with_the_list():
    assert set(HoliTomConfig.presets()) == set(PAPER)
    with pytest.raises(ValueError, match=r"no HoliTom preset or file 'r15'; presets: .*llava-onevision-7b-r15"):
        HoliTomConfig.from_preset("r15")


def test_what_is_off_is_told_from_the_settings_alone():
    assert HoliTomConfig(retention_ratio=1.0, inner_merge_layer=None).is_identity
    assert HoliTomConfig(outer_method="none", inner_method="none").is_identity
    assert HoliTomConfig(retention_ratio=1.0, inner_merge_ratio=0.0).is_identity
    assert not HoliTomConfig(retention_ratio=1.0).is_identity
    assert not HoliTomConfig(inner_merge_layer=None).is_identity


class TestModelConfig:
    def test_the_settings_survive_config_json(self, tmp_path):
        config = HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=HoliTomConfig(retention_ratio=0.2))
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["model_type"] == "llava_onevision"
        assert saved["text_config"]["model_type"] == "qwen2"
        assert saved["holitom_config"] == DEFAULTS | {"retention_ratio": 0.2}
        loaded = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path)
        assert loaded.holitom_config == config.holitom_config
        assert loaded.to_dict() == config.to_dict()

    def test_upstreams_class_reads_the_same_file(self, tmp_path):
        HoliTomLlavaOnevisionConfig(**SMALL).save_pretrained(tmp_path)
        loaded, expected = LlavaOnevisionConfig.from_pretrained(tmp_path), LlavaOnevisionConfig(**SMALL)
        assert type(loaded) is LlavaOnevisionConfig
        assert loaded.text_config.to_dict() == expected.text_config.to_dict()
        assert loaded.vision_config.to_dict() == expected.vision_config.to_dict()

    @pytest.mark.parametrize(
        "given",
        [
            HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.65),
            "llava-onevision-7b-r10",
            {"retention_ratio": 0.1, "similarity_threshold": 0.65},
        ],
    )
    def test_settings_may_be_an_object_a_preset_or_a_dictionary(self, tmp_path, given):
        LlavaOnevisionConfig(**SMALL).save_pretrained(tmp_path)
        expected = HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.65)
        assert HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=given).holitom_config == expected
        loaded = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path, holitom_config=given)
        assert loaded.holitom_config == expected

    def test_a_decoder_that_is_not_qwen2_is_refused(self):
        text = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
        with pytest.raises(ValueError, match=r"merges inside a Qwen2 decoder; .* is 'llama'"):
            HoliTomLlavaOnevisionConfig(**SMALL | {"text_config": text})

    def test_something_else_than_settings_is_refused(self):
        with pytest.raises(TypeError, match="holitom_config must be a HoliTomConfig, a dict, a preset name or a path"):
            HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=HoliTomConfig.coerce(0.15))
