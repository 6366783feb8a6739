"""Tests of the plugin: most need vLLM, in an environment of its own (`make test-vllm`)."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, help="what transformers_answers.py wrote")


def written(request, suffix):
    """What transformers_answers.py wrote: its file, or a folder beside it. An old run that lacks one is an error."""
    file = request.config.getoption("--answers", None)
    if file is None:
        pytest.skip("needs --answers, the file of transformers_answers.py")
    path = file.absolute().with_suffix(suffix)
    assert path.exists(), f"{path} is missing: run tests.vllm.transformers_answers anew"
    return path


@pytest.fixture(scope="session")
def transformers_answers(request):
    return json.loads(written(request, ".json").read_text())


@pytest.fixture(scope="session")
def transformers_batch(request):
    """The folder with inputs of a batch and what transformers recorded, absolute as it was there."""
    return written(request, ".batch")


@pytest.fixture(scope="session")
def transformers_checkpoints(request):
    """The folder with checkpoints that our transformers class saved: `whole`, and `settings` alone."""
    return written(request, ".checkpoints")


@pytest.fixture(scope="session")
def transformers_qwen2_5_vl(request):
    """The folder with the small Qwen2.5-VL that our transformers class saved."""
    return written(request, ".qwen2_5_vl")


@pytest.fixture(scope="session")
def transformers_models(request):
    """The folder with models of random weights."""
    return written(request, ".models")
