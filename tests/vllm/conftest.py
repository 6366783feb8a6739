"""Tests of the plugin: most need vLLM, in an environment of its own (`make test-vllm`)."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, help="what transformers_answers.py wrote")


@pytest.fixture(scope="session")
def transformers_answers(request):
    file = request.config.getoption("--answers", None)
    if file is None:
        pytest.skip("needs --answers, the file of transformers_answers.py")
    return json.loads(file.read_text())


@pytest.fixture(scope="session")
def transformers_batch(request):
    """The folder with inputs of a batch and what transformers recorded, absolute as it was there."""
    file = request.config.getoption("--answers", None)
    folder = None if file is None else file.absolute().with_suffix(".batch")
    if folder is None or not folder.is_dir():
        pytest.skip("needs --answers, the file of transformers_answers.py, and the folder it wrote beside")
    return folder
