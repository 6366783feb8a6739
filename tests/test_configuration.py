import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlavaOnevisionConfig
from transformers.utils import logging

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
    "skipped_layers": None,
    "newline_position": "end",
    "position_ids": "packed",
    "proportional_attention": False,
    "virtual_unmerging": False,
    "exact_budget": False,
    "min_frame_tokens": 4,
    "importance_weight": 0.0,
    "vision_method": "reuse",
    "vision_reuse_layer": None,
    "vision_reuse_threshold": 0.98,
    "vision_retention_ratio": 0.5,
    "vision_merge_thresholds": None,
    "vision_drift_guard": True,
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
    ("outer_method", "fastv", "'random_tokens', 'regular_grid', 'average_pooling', 'none'"),
    ("inner_method", "fold", "'merge', 'prune', 'prune_by_question', 'none'"),
    ("skipped_layers", [3, 3], "a list of different layers, integers >= 0, or None"),
    ("skipped_layers", [-1], "a list of different layers, integers >= 0, or None"),
    ("newline_position", "column", "'end', 'row'"),
    ("position_ids", "moved", "'packed', 'kept'"),
    ("min_frame_tokens", 0, "an integer >= 1"),
    ("importance_weight", -0.5, "w >= 0"),
]
WRONG_TYPE = [
    ("retention_ratio", "0.15", "a number"),
    ("retention_ratio", True, "a number"),
    ("retention_ratio", None, "a number"),
    ("max_segment_frames", 4.0, "an integer >= 1 or None"),
    ("cluster_neighbors", None, "an integer >= 1"),
    ("inner_merge_layer", "18", "an integer >= 1 or None"),
    ("skipped_layers", 3, "a list of different layers, integers >= 0, or None"),
    ("skipped_layers", [True], "a list of different layers, integers >= 0, or None"),
    ("proportional_attention", 1, "True or False"),
    ("exact_budget", 0, "True or False"),
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
    assert config == HoliTomConfig()


@pytest.mark.parametrize(
    "make",
    [
        lambda: HoliTomConfig(tau=0.8),
        lambda: HoliTomConfig.from_dict({"tau": 0.8}),
        lambda: HoliTomConfig.coerce({"tau": 0.8}, HoliTomConfig(retention_ratio=0.2)),
        lambda: replace(HoliTomConfig(), tau=0.8),
        lambda: setattr(HoliTomConfig(), "tau", 0.8),
        lambda: HoliTomLlavaOnevisionConfig(**SMALL, holitom_config={"tau": 0.8}),
    ],
)
def test_an_unknown_field_is_the_same_error_however_it_is_set(make):
    with pytest.raises(ValueError, match=r"HoliTomConfig has no field 'tau'; its fields are .*similarity_threshold"):
        make()


def test_a_vision_method_without_a_layer_says_once_that_it_does_nothing(caplog):
    logging.get_logger("holitom_hf.configuration").warning_once.cache_clear()
    message = "vision_method does nothing without vision_reuse_layer"
    with caplog.at_level("WARNING", logger="holitom_hf.configuration"):
        HoliTomConfig(vision_method="tome", vision_reuse_layer=1)
        HoliTomConfig(vision_retention_ratio=0.4)
        assert not caplog.messages
        HoliTomLlavaOnevisionConfig(**SMALL, holitom_config={"vision_method": "tome"})
        HoliTomConfig.from_dict({"vision_method": "tome"})
        assert caplog.messages == [message]


def test_numbers_of_numpy_are_numbers(tmp_path):
    given = {"retention_ratio": np.float32(0.25), "similarity_threshold": np.float64(0.5)}
    config = HoliTomConfig(**given, max_segment_frames=np.int64(4), inner_merge_layer=np.uint8(2))
    assert config == HoliTomConfig(0.25, 0.5, 4, inner_merge_layer=2)
    assert {type(value) for value in config.to_dict().values()} == {float, int, str, bool, type(None)}
    config.save_pretrained(tmp_path)
    assert HoliTomConfig.from_pretrained(tmp_path) == config
    with pytest.raises(TypeError, match="retention_ratio must be a number"):
        HoliTomConfig(retention_ratio=np.True_)
    with pytest.raises(TypeError, match="cluster_neighbors must be an integer"):
        HoliTomConfig(cluster_neighbors=np.float32(3))
    with pytest.raises(ValueError, match="retention_ratio must be a number"):
        HoliTomConfig(retention_ratio=np.float16("nan"))


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
    "llava-onevision-72b-r15-no-inner": {"inner_merge_layer": None},
    "llava-video-7b-r15": {"newline_position": "row"},
    "llava-onevision-0.5b-r15": {"inner_merge_layer": 15},
}
FARTHEST = {
    "outer_method": "farthest_points",
    "inner_method": "none",
    "inner_merge_layer": None,
    "similarity_threshold": 1.0,
    "position_ids": "kept",
    "proportional_attention": True,
}
PRESETS = PAPER | {
    "farthest-points-r25": FARTHEST | {"retention_ratio": 0.25},
    "farthest-points-r15": FARTHEST,
    "farthest-points-r10": FARTHEST | {"retention_ratio": 0.10},
    "farthest-points-r05": FARTHEST | {"retention_ratio": 0.05},
    "uncompressed": {
        "retention_ratio": 1.0,
        "outer_method": "none",
        "inner_method": "none",
        "inner_merge_layer": None,
    },
}
QWEN_LAYERS = {
    "qwen2.5-vl-7b": 18,
    "qwen3-vl-8b": 23,
    "qwen3-vl-30b-a3b": 31,
    "qwen3.5-9b": 20,
    "qwen3.5-35b-a3b": 24,
}
PRESETS |= {
    f"{model}-r{percent}": {"retention_ratio": percent / 100, "inner_merge_layer": layer, "position_ids": "kept"}
    for model, layer in QWEN_LAYERS.items()
    for percent in (25, 15)
}
FAST = ("llava-onevision-7b-r15", "llava-onevision-7b-r10", "llava-onevision-0.5b-r15")
FAST += ("farthest-points-r15", "farthest-points-r10")
FAST += tuple(f"{model}-r{percent}" for model in QWEN_LAYERS for percent in (25, 15))
PRESETS |= {f"{name}-fast": PRESETS[name] | {"vision_reuse_layer": 2} for name in FAST}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_by_name_and_hold_the_papers_settings_or_ours(name):
    assert HoliTomConfig.from_preset(name) == HoliTomConfig(**PRESETS[name])
    assert HoliTomConfig.from_pretrained(HoliTomConfig.presets()[name]) == HoliTomConfig(**PRESETS[name])


def test_all_presets_are_tested_and_an_unknown_one_is_answered_with_the_list():
    assert set(HoliTomConfig.presets()) == set(PRESETS)
    with pytest.raises(ValueError, match=r"no HoliTom preset or file 'r15'; presets: .*llava-onevision-7b-r15"):
        HoliTomConfig.from_preset("r15")


@pytest.mark.parametrize(("depth", "layer_for_18", "layer_for_60"), [(8, 5, 6), (2, 1, 1), (16, 10, 12)])
def test_a_presets_layer_beyond_the_decoder_is_answered_with_the_one_at_the_same_depth(
    depth, layer_for_18, layer_for_60
):
    for name, layer, whole, here in (
        ("llava-onevision-7b-r15", 18, 28, layer_for_18),
        ("llava-onevision-72b-r15", 60, 80, layer_for_60),
    ):
        message = (
            f"is {layer}, but the decoder has {depth} layers: choose 1 to {depth - 1} (layer {layer} of {whole} is "
        )
        with pytest.raises(ValueError, match=re.escape(f"{message}{here} here), or None to leave stage 3 out")):
            HoliTomConfig.from_preset(name).check_decoder_depth(depth)
    HoliTomConfig(inner_merge_layer=here).check_decoder_depth(depth)
    with pytest.raises(ValueError, match=rf"is 99, but .* choose 1 to {depth - 1}, or None"):
        HoliTomConfig(inner_merge_layer=99).check_decoder_depth(depth)


def test_for_every_presets_layer_its_decoder_is_known():
    layers = {HoliTomConfig.from_preset(name).inner_merge_layer for name in HoliTomConfig.presets()} - {None}
    assert layers <= set(HoliTomConfig.depth_of_layer)


def test_presets_are_listed_without_torch():
    code = "import sys; from holitom_hf.presets import preset_files; print(*preset_files(), 'torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) == {*PRESETS, "False"}


def test_where_the_package_is_not_installed_a_presets_name_says_so(monkeypatch):
    monkeypatch.setattr(HoliTomConfig, "presets", staticmethod(dict))
    with pytest.raises(ValueError, match=r"presets are part of the package holitom-hf.*pass a dictionary of fields"):
        HoliTomConfig.coerce("llava-onevision-7b-r10")


class TestOverlay:
    own = HoliTomConfig(
        retention_ratio=0.3, similarity_threshold=0.6, inner_merge_layer=2, base_model_name_or_path="b"
    )

    def test_a_dictionary_changes_its_fields_and_no_others(self):
        changed = HoliTomConfig.coerce({"retention_ratio": 0.1, "inner_merge_layer": None}, self.own)
        assert changed.to_dict() == self.own.to_dict() | {"retention_ratio": 0.1, "inner_merge_layer": None}
        assert self.own.retention_ratio == 0.3
        assert HoliTomConfig.coerce({}, self.own) == self.own
        assert HoliTomConfig.coerce(None, self.own) is self.own

    @pytest.mark.parametrize("given", [HoliTomConfig(retention_ratio=0.2), "llava-onevision-7b-r20"])
    def test_settings_and_presets_replace_all_of_them(self, given):
        assert HoliTomConfig.coerce(given, self.own) == HoliTomConfig(retention_ratio=0.2)

    def test_so_does_a_file(self, tmp_path):
        (tmp_path / "some.json").write_text('{"retention_ratio": 0.2}')
        assert HoliTomConfig.coerce(tmp_path / "some.json", self.own) == HoliTomConfig(retention_ratio=0.2)

    def test_in_a_configuration_however_it_is_set(self, tmp_path):
        HoliTomLlavaOnevisionConfig(**SMALL, holitom_config=self.own).save_pretrained(tmp_path)
        expected = replace(self.own, retention_ratio=0.1)
        loaded = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path, holitom_config={"retention_ratio": 0.1})
        assert loaded.holitom_config == expected
        loaded = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path)
        before = loaded.holitom_config
        loaded.holitom_config = {"retention_ratio": 0.1}
        assert loaded.holitom_config == expected
        assert before == self.own
        assert HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path, holitom_config=None).holitom_config == self.own
        preset = HoliTomLlavaOnevisionConfig.from_pretrained(tmp_path, holitom_config="llava-onevision-7b-r15")
        assert preset.holitom_config == HoliTomConfig()


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
