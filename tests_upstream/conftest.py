"""Where upstream's tests come from, and which of them fail by contract."""

import fnmatch
import sys
import types
from pathlib import Path

import pytest

from .download import download_tests


HERE = Path(__file__).parent
PACKAGE = "upstream_tests"


def pytest_addoption(parser):
    parser.addoption("--cache", type=Path, default=Path(".upstream"), help="where source distributions are kept")
    parser.addoption("--checkout", type=Path, help="a checkout of transformers, whose tests/ is taken instead")


def pytest_configure(config):
    """Makes upstream's tests importable as one package, behind which the stand-ins lie."""
    checkout = config.getoption("--checkout")
    folder = checkout / "tests" if checkout else download_tests(config.getoption("--cache"))
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder), str(HERE / "stand_ins")]
    sys.modules[PACKAGE] = package
    sys.path.append(str(HERE / "stand_ins"))
    config.upstream_folder = folder


def pytest_report_header(config):
    """Says what is left out."""
    modules = [file.relative_to(HERE / "stand_ins") for file in (HERE / "stand_ins").rglob("test_*.py")]
    missing = [str(file) for file in modules if not (config.upstream_folder / file).exists()]
    return f"upstream's tests: {config.upstream_folder}, without {', '.join(sorted(missing)) or 'nothing'}"


def listed_failures() -> list[tuple[str, str]]:
    """Patterns of `Class::test`, and why these fail."""
    lines = (HERE / "expected_failures.txt").read_text().splitlines()
    entries = [line.split("|", 1) for line in lines if line.strip() and not line.startswith("#")]
    return [(pattern.strip(), reason.strip()) for pattern, reason in entries]


def pytest_collection_modifyitems(config, items):
    """What is listed must fail; what is not listed must not; what is listed must be there."""
    names = {item: f"{item.cls.__name__}::{item.name}" for item in items if item.cls is not None}
    for pattern, reason in listed_failures():
        matching = [item for item, name in names.items() if fnmatch.fnmatchcase(name, pattern)]
        for item in matching:
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
        if not matching and len(config.args) == 1 and Path(config.args[0]).resolve() == HERE:
            raise pytest.UsageError(f"expected_failures.txt lists {pattern!r}, which no test of this version matches")
