"""What README and docs say is true: their code runs, their tables are whole, what they name exists."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.apps.command_line.app import app
from holitom_hf.merging import METHODS


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md"]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in LINKING}
# What a reader copies a model's name from, and settings for it: a small model with 8 layers stands in for it.
HUB_NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
HUB_PRESETS = ("llava-onevision-7b-r10", "llava-onevision-7b-r15")


def load_hooks():
    """The hooks of the site, which know how pages link."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("holitom-hf ")]


@pytest.fixture(scope="module", autouse=True)
def preset(demo):
    # A checkpoint on the Hub is upstream's: whole, and without settings.
    settings = HoliTomConfig(retention_ratio=0.1, inner_merge_layer=4)
    (demo / "preset.json").write_text(json.dumps(settings.to_dict()))


@pytest.fixture
def own_methods():
    """Methods that a page adds are gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def local(text: str, demo: Path) -> str:
    """The small model and the clip in place of the downloads, and settings for its 8 layers."""
    text = text.replace(HUB_NAME, str(demo / "model")).replace("video.mp4", str(demo / "clip.mp4"))
    text = text.replace("examples/", f"{ROOT / 'examples'}/")
    for name in HUB_PRESETS:
        text = text.replace(name, str(demo / "preset.json"))
    return text


def after_readme(names: dict, folder: Path) -> None:
    assert type(names["model"]).__name__ == "HoliTomLlavaOnevisionForConditionalGeneration"
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def after_generation(names: dict, folder: Path) -> None:
    assert type(names["model"]).__name__ == "HoliTomLlavaOnevisionForConditionalGeneration"
    assert names["video"].num_tokens < 0.25 * names["video"].num_input_tokens
    assert type(names["pipe"]).__name__ == "VideoTextToTextPipeline"


def after_checkpoints(names: dict, folder: Path) -> None:
    assert type(names["model"]).__name__ == "HoliTomLlavaOnevisionForConditionalGeneration"
    assert (folder / "my-holitom-model" / "model.safetensors").exists()
    assert (folder / "my-settings" / "config.json").exists()
    assert not list((folder / "my-settings").glob("*.safetensors"))


AFTERWARDS = {
    "README.md": after_readme,
    "docs/generation.md": after_generation,
    "docs/checkpoints.md": after_checkpoints,
}


class TestPython:
    def test_pages_have_snippets(self):
        assert {page for page in PAGES if blocks(page, "python")} >= {
            "README.md",
            "docs/adding_a_method.md",
            "docs/checkpoints.md",
            "docs/generation.md",
            "docs/method.md",
            "docs/settings.md",
        }
        assert sum(len(blocks(page, "python")) for page in PAGES) >= 12

    @pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
    def test_snippets_run_one_after_another(self, page, demo, tmp_path, monkeypatch, own_methods):
        monkeypatch.chdir(tmp_path)
        names = {"__name__": "snippet"}
        for snippet in blocks(page, "python"):
            exec(compile(local(snippet, demo), page, "exec"), names)
        if page in AFTERWARDS:
            AFTERWARDS[page](names, tmp_path)


class TestCommands:
    def test_every_command_is_shown_once_at_least(self):
        shown = {shlex.split(line)[1] for page in PAGES for line in commands(page)}
        assert shown >= {"answer", "convert", "visualize", "questions", "batch", "evaluate", "flops", "bench"}

    @pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
    def test_commands_run_one_after_another(self, page, demo, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for command in commands(page):
            arguments = shlex.split(local(command, demo))[1:]
            if arguments[0] == "answer":
                arguments += ["--max-new-tokens", "3"]
            if arguments[0] in ("questions", "evaluate"):
                arguments += ["--num-questions", "3"]
            if arguments[0] == "bench":
                arguments += ["--frames", "2", "--rounds", "1", "--new-tokens", "2"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (command, result.stderr)

    def test_tables_and_text_name_commands_that_exist(self):
        known = {command.name or command.callback.__name__ for command in app.registered_commands}
        for group in app.registered_groups:
            known |= {c.name or c.callback.__name__ for c in group.typer_instance.registered_commands}
        for page in LINKING:
            for name in re.findall(r"`holitom-hf ([a-z][a-z-]*)", TEXT[page]):
                assert name in known, (page, name)


class TestSettings:
    @staticmethod
    def row_of(field: str) -> list[str]:
        rows = [line.split("|") for line in TEXT["docs/settings.md"].splitlines() if line.startswith("|")]
        return next(row for row in rows if f"`{field}`" in row[1])

    @pytest.mark.parametrize("name", HoliTomConfig().to_dict())
    def test_the_table_has_every_field_with_its_default(self, name):
        default, shown = HoliTomConfig().to_dict()[name], self.row_of(name)[2].strip()
        if isinstance(default, float):
            assert float(shown) == default
        else:
            assert shown == (f'"{default}"' if isinstance(default, str) else str(default))

    @pytest.mark.parametrize("method", [*METHODS, "none"])
    def test_the_table_has_every_method(self, method):
        assert f'"{method}"' in self.row_of("outer_method")[3]

    @pytest.mark.parametrize("method", METHODS)
    def test_the_method_page_says_what_each_does(self, method):
        assert re.search(rf"^\| `{method}` \|", TEXT["docs/method.md"], flags=re.MULTILINE)

    def test_presets_that_are_named_exist(self):
        names = {
            name
            for page in LINKING
            for name in re.findall(r"llava-(?:onevision|video)-[\d.]+b-r\d+[\w-]*", TEXT[page])
        }
        assert {*HUB_PRESETS} < names <= set(HoliTomConfig.presets())


class TestNames:
    def test_the_readme_is_short(self):
        assert len(TEXT["README.md"].splitlines()) < 200

    def test_make_targets_exist(self):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        named = {target for page in LINKING for target in re.findall(r"`make ([a-z-]+)`", TEXT[page])}
        assert named >= {"demo", "test", "docs", "test-all"}
        for target in named:
            assert f"\n{target}:" in makefile, target

    @pytest.mark.parametrize("page", [page for page in LINKING if page != "CHANGELOG.md"])
    def test_files_in_code_exist(self, page):
        """`models/decoder.py` and `tests/reference.py` are found; file names alone are of examples to come."""
        for name in re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|md|json|npz|toml)|[\w.-]+(?:/[\w.-]+)*/)`", TEXT[page]):
            if name == "merging/methods/every_nth.py":  # what a reader is asked to write
                continue
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "holitom_hf")), name

    @pytest.mark.parametrize("page", LINKING)
    def test_links_point_to_files_and_headings(self, page):
        for link in HOOKS.links(TEXT[page]):
            path, _, anchor = link.partition("#")
            target = HOOKS.repository_path(page, path) if path else page
            assert (ROOT / target).exists(), link
            if anchor:
                assert anchor in anchors(target), link

    def test_every_page_is_in_the_navigation(self):
        navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
        for name in [*(page.removeprefix("docs/") for page in PAGES[1:]), *HOOKS.PAGES.values()]:
            assert f": {name}\n" in navigation, name


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_site_builds_without_a_warning(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    pages = {file.relative_to(tmp_path / "site").as_posix() for file in (tmp_path / "site").rglob("*")}
    assert {"architecture/index.html", "speed/index.html", "examples/merging.png"} <= pages
    # A reader's browser asks nobody else for fonts or scripts.
    html = (tmp_path / "site" / "speed" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?https?://', html)
