"""From a package to flat files: what is found, what is rewritten, what is refused."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.checkpoints.flattening import flat_package, flatten
from holitom_hf.checkpoints.remote_code import carried_modules
from holitom_hf.merging import METHODS, MergingSettings, merge_video_tokens
from holitom_hf.models.llava_onevision.backbone import BACKBONE
from holitom_hf.models.registry import backbones


# Backbones whose classes are subclasses of another's.
PARENTS = {"llava_video": {"llava_onevision"}}
FILES = {
    "entry.py": '''
"""
The door.

More about the door.
"""
from .room.table import (
    SIZE,
    lay,  # a comment goes
)


def main():
    """One line. And a half, 2.5
    in all."""
    from .room.deep.chair import sit

    return lay() + SIZE + sit()


class Guest:
    """
    Comes in, sits at the table of 2.5
    legs, and eats. Then it

    goes out.
    """

    def leave(self):
        """Goes

        home.
        """
        return 1

    def eat(self):
        """Hook. With a fork."""

    name = "from .room.table import nothing"
''',
    "room/table.py": "from ..plain import ONE\n\nSIZE = ONE\n\n\ndef lay():\n    return ONE\n",
    "room/deep/chair.py": "from ...plain import ONE as one\nfrom ..table import SIZE\n\nsit = lambda: one + SIZE\n",
    "plain.py": "ONE = 1\n",
    "unused.py": "raise RuntimeError\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_entries_import_is_written_under_joined_names_and_runs(tmp_path):
    source = write(tmp_path / "package", FILES)
    modules = flatten(source, {"entry_point": source / "entry.py"})
    assert set(modules) == {"entry_point", "room_table", "room_deep_chair", "plain"}
    flat = write(tmp_path / "flat", {"__init__.py": ""} | {f"{name}.py": text for name, text in modules.items()})
    code = "from flat.entry_point import Guest, main; print(main(), Guest.name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=flat.parent, check=True)
    assert run.stdout.strip() == "4 from .room.table import nothing"


def test_comments_are_left_out_docstrings_too_or_cut_to_a_sentence(tmp_path):
    source = write(tmp_path, FILES)
    text = flatten(source, {"entry_point": source / "entry.py"})["entry_point"]
    assert text.startswith('# holitom_hf/entry.py\n\n"""The door."""\n')
    assert "    lay,\n" in text
    assert '    """Comes in, sits at the table of 2.5\n    legs, and eats."""\n    def' in text
    assert "def main():\n    from .room_deep_chair" in text
    assert "    def leave(self):\n        return 1\n" in text
    assert '    def eat(self):\n        """Hook."""\n' in text
    for gone in ("More about", "Then it", "goes out", "One line", "And a half", "home", "fork"):
        assert gone not in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"entry.py": "from .plain import TWO\n", "plain.py": "ONE = 1\n"},
            "entry_point.py imports TWO from plain.py",
        ),
        ({"entry.py": "from .room import table\n", "room/table.py": ""}, "packages have no flat form"),
        ({"entry.py": "from . import plain\n", "plain.py": ""}, "line 1: .* names from modules only"),
        ({"entry.py": "from .missing import it\n"}, "there is no .*missing.py"),
        (
            {"entry.py": "from .a_b import X\nfrom .a.b import X\n", "a_b.py": "X = 1\n", "a/b.py": "X = 1\n"},
            "two modules would be called a_b.py",
        ),
        ({"entry.py": "from .plain \\\n    import ONE\n", "plain.py": "ONE = 1\n"}, "must stand on one line"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, files, message):
    source = write(tmp_path, files)
    with pytest.raises(ImportError, match=message):
        flatten(source, {"entry_point": source / "entry.py"})


@pytest.mark.parametrize("backbone", backbones().values(), ids=lambda backbone: backbone.model_type)
class TestBackbones:
    def test_every_module_imports_where_neither_the_package_nor_its_folders_are(self, backbone, tmp_path):
        modules = flat_package(backbone)
        write(tmp_path / "flat", {"__init__.py": ""} | {f"{name}.py": text for name, text in modules.items()})
        code = (
            "import importlib, sys\n"
            "sys.modules['holitom_hf'] = None\n"
            f"for name in {sorted(modules)}:\n    importlib.import_module('flat.' + name)\n"
            "print('all of them')"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert run.stdout.strip() == "all of them", run.stderr

    def test_a_preset_is_missed_in_plain_words_and_a_dictionary_overlays(self, backbone, tmp_path):
        modules = flat_package(backbone)
        write(tmp_path / "flat", {"__init__.py": ""} | {f"{name}.py": text for name, text in modules.items()})
        code = (
            "import sys\n"
            "sys.modules['holitom_hf'] = None\n"
            "from flat.configuration import HoliTomConfig\n"
            "own = HoliTomConfig(similarity_threshold=0.5)\n"
            "print(HoliTomConfig.coerce({'retention_ratio': 0.1}, own).to_dict())\n"
            "HoliTomConfig.coerce('llava-onevision-7b-r10', own)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        expected = HoliTomConfig(retention_ratio=0.1, similarity_threshold=0.5).to_dict()
        assert run.stdout.strip() == str(expected), run.stderr
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "ValueError: There is no file 'llava-onevision-7b-r10', and presets are part of the package"
        )

    def test_it_carries_its_own_backbone_only_and_little(self, backbone):
        """And the one that it is made of, if it is."""
        modules = flat_package(backbone)
        # One name may begin as another does: the longest counts.
        owners = {
            max((other for other in backbones() if name.startswith(f"models_{other}")), key=len, default=None)
            for name in modules
        }
        parents = PARENTS.get(backbone.model_type, set())
        assert owners == {None, backbone.model_type, *parents}
        assert sum(map(len, modules.values())) < (235_000 if parents else 220_000)
        assert modules == carried_modules(backbone)

    def test_code_is_the_same_but_for_imports_and_docstrings(self, backbone):
        def bare(text: str) -> str:
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level:
                    node.module, node.level = "somewhere", 1
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    node.body = node.body[1:] or [ast.Pass()]
            return ast.dump(tree)

        root = Path(sys.modules["holitom_hf"].__file__).parent
        for name, text in flat_package(backbone).items():
            origin = text.split("\n")[0].removeprefix("# holitom_hf/")
            assert bare(text) == bare((root / origin).read_text()), name


def test_comments_and_what_is_there_to_compare_with_stay_in_the_package():
    modules = flat_package(BACKBONE)
    for source in modules.values():
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        assert len(comments) == 1
        assert comments[0].startswith("# holitom_hf/")
    carried = {name for name, method in METHODS.items() if f"merging_methods_{name}" in modules}
    assert carried == {"holitom", "farthest_points"}


def test_a_control_that_is_not_there_says_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "holitom_hf.merging.methods.regular_grid", None)
    settings = MergingSettings(outer_method="regular_grid", retention_ratio=0.5)
    with pytest.raises(
        ImportError, match=r"'merging.methods.regular_grid' is there to compare with.*pip install holitom-hf"
    ):
        merge_video_tokens(torch.randn(2, 4, 8), torch.rand(2, 4), settings)


def test_an_exact_budget_says_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "holitom_hf.merging.budget", None)
    settings = MergingSettings(exact_budget=True)
    with pytest.raises(ImportError, match=r"'merging.budget' is what exact_budget needs.*pip install holitom-hf"):
        merge_video_tokens(torch.randn(2, 4, 8), torch.rand(2, 4), settings)
