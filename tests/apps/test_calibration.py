"""Layers that visual tokens can leave work out in, found on a few questions."""

import json

import pytest
import torch
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.answering.answerer import Answerer
from holitom_hf.answering.calibration import find_skipped_layers, rank_layers
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import read_set, write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, 2, "validation")
    return folder


@pytest.fixture(scope="module")
def prepared(folder):
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    asked = read_set(folder)[0]
    question = answerer.prepare(str(folder / asked.video), asked.text, num_frames=8)
    answerer.encode(question)
    return answerer, [question]


def test_each_next_layer_is_the_one_that_changes_least_beside_those_before():
    """Layer 0 alone changes least, then 2: together with 0, 1 changes more than it does alone."""
    changes = {(): 0.0, (0,): 0.1, (1,): 0.2, (2,): 0.3, (0, 1): 0.9, (0, 2): 0.4, (0, 2, 1): 1.0}
    asked = []

    def next_token(skipped):
        asked.append(tuple(skipped))
        return torch.tensor([[0.0, changes[tuple(skipped)]]])

    found = list(rank_layers(next_token, range(3), 3))
    assert [step.layer for step in found] == [0, 2, 1]
    assert len(asked) == len(set(asked)) == 7
    with_, without = torch.tensor([0.0, 0.0]).softmax(0), torch.tensor([0.0, 0.4]).softmax(0)
    assert found[1].divergence == pytest.approx(float((without * (without / with_).log()).sum()), abs=1e-6)


@pytest.mark.parametrize("method", ["skip_ffn", "freeze"])
def test_a_layer_that_does_nothing_is_found_first(prepared, method):
    """The last one but for it: what becomes of visual tokens there, no text sees."""
    answerer, questions = prepared
    settings = HoliTomConfig(retention_ratio=0.3, inner_method=method)
    layer = answerer.model.model.language_model.layers[3]
    before = {name: weight.clone() for name, weight in layer.named_parameters()}
    with torch.no_grad():
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    try:
        found = list(find_skipped_layers(answerer, questions, settings, 2))
    finally:
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                weight.copy_(before[name])
    assert [step.layer for step in found] == [3, 7]
    assert found[1].divergence == pytest.approx(0, abs=1e-6)
    [whole] = find_skipped_layers(answerer, questions, settings, 1)
    assert whole.layer == 7
    with pytest.raises(ValueError, match="9 layers can't be found among 8"):
        list(find_skipped_layers(answerer, questions, settings, 9))


def test_the_command_writes_settings_that_a_model_takes(folder, tmp_path):
    file = tmp_path / "settings.json"
    options = ["--method", "freeze", "--layers", "1", "--retention-ratio", "0.2", "--questions", str(folder)]
    result = CliRunner().invoke(app, ["calibrate", "--out", str(file), *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "2 questions, freeze in 1 layers" in result.output
    settings = HoliTomConfig.from_pretrained(file)
    assert settings.skips
    assert settings.skipped_layers == [7]
    assert settings.retention_ratio == 0.2
    assert json.loads(file.read_text())["skipped_layers"] == [7]
    assert list(tmp_path.iterdir()) == [file]
    result = CliRunner().invoke(app, ["calibrate", "--out", str(file), "--method", "merge", "--layers", "1"])
    assert result.exit_code == 1
