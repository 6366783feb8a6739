"""The house's rules, read from the code: who imports whom, what is private, what is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import holitom_hf
from holitom_hf.merging import METHODS
from holitom_hf.merging.vision_methods import VISION_METHODS
from holitom_hf.models.registry import backbones
from holitom_hf.models.vision_methods import VISION_ENCODERS


SOURCE = Path(holitom_hf.__file__).parent
# From the bottom to the top.
ROOMS = (
    "merging",
    "presets",
    "configuration",
    "sequence",
    "video",
    "checkpoints",
    "models",
    "bundled",
    "answering",
    "evaluation",
    "benchmarking",
    "vllm",
    "apps",
)
# The door, and the names of 0.1 that go on working.
OUTSIDE = {"__init__", "__main__", "temporal_segmentation", "token_merging", "inner_merging"}
FILES = sorted(SOURCE.rglob("*.py"))
# Of transformers and torch, which have no public name for what they do.
UPSTREAM_PRIVATE = {"_from_config", "_attn_implementation", "_name_or_path", "_schema"}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> set[str]:
    """The rooms that a file imports something from, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].relative_to(SOURCE).parts
            rooms.add([*folder, *(node.module or "").split(".")][0])
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            rooms.update(name.split(".")[1] for name in modules if name.startswith("holitom_hf."))
    return rooms


def test_a_room_imports_only_downwards():
    for file in FILES:
        if (room := room_of(file)) not in OUTSIDE:
            assert imported_rooms(file) <= set(ROOMS[: ROOMS.index(room) + 1]), file


def test_every_file_is_in_a_room():
    assert {room_of(file) for file in FILES} == {*ROOMS, *OUTSIDE}


def test_vllm_is_imported_in_its_room_alone():
    for file in FILES:
        imports = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)
        ]
        modules = {
            name.split(".")[0]
            for node in imports
            if not getattr(node, "level", 0)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        assert "vllm" not in modules or room_of(file) == "vllm", file


def private_uses(file: Path) -> list[str]:
    """Where a file imports a private name of ours, or reads one of an object that is not its own."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found += [ast.unparse(node) for alias in node.names if alias.name.startswith("_")]
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            # An override may call what it overrides.
            is_own = owner in ("self", "cls", "os") or "super()" in owner
            found += [] if is_own or node.attr in UPSTREAM_PRIVATE else [ast.unparse(node)]
    return found


def test_nothing_reaches_into_the_private_names_of_others():
    assert {file: uses for file in FILES if (uses := private_uses(file))} == {}


def test_a_method_is_named_in_the_registry_alone():
    names = set(METHODS) - {"holitom"}  # which is the default of a setting, too
    for file in FILES:
        if file == SOURCE / "merging" / "registry.py":
            continue
        constants = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        # The ablation over windows names the method it is about.
        assert constants & names <= ({"fixed_windows"} if file.name == "methods.py" else set()), file


def test_a_vision_method_is_named_in_its_registry_alone():
    assert tuple(VISION_ENCODERS) == VISION_METHODS
    names = set(VISION_METHODS) - {"frames"}  # a word that has other uses
    for file in FILES:
        if file != SOURCE / "merging" / "vision_methods.py":
            constants = {
                node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)
            }
            assert not constants & names, file


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_method_needs_torch_alone():
    result = run(
        "import sys\n"
        "sys.modules['transformers'] = None  # importing it now fails\n"
        "import torch\n"
        "from holitom_hf.merging import MergingSettings, merge_hidden_states, merge_video_tokens, segment_frames\n"
        "from holitom_hf.sequence import compaction, compressed_sequence, inner_stage, packed_rows, placeholders\n"
        "settings = MergingSettings(retention_ratio=0.25, similarity_threshold=0.5)\n"
        "merged = merge_video_tokens(torch.ones(4, 4, 8), torch.rand(4, 4), settings)\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(merged.num_tokens, merged.segments, sorted(loaded & {'huggingface_hub', 'av', 'accelerate'}))\n"
    )
    assert result.stdout.split("\n")[0] == "4 [(0, 4)] []", result.stderr


@pytest.mark.parametrize(
    "code", ["import holitom_hf; dir(holitom_hf)", "from holitom_hf.apps.command_line.app import app"]
)
def test_importing_the_package_or_its_commands_imports_nothing_heavy(code):
    result = run(
        f"import sys\n{code}\nprint([m for m in ('torch', 'transformers', 'numpy', 'av') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['holitom-hf', '--help']\n"
        "try:\n    runpy.run_module('holitom_hf', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'av') if m in sys.modules])"
    )
    lines = run(code).stdout.strip().splitlines()
    assert "Usage: holitom-hf" in " ".join(lines)
    assert lines[-1] == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import holitom_hf; import transformers.pipelines",
        "import transformers.pipelines; import holitom_hf",
        "from transformers import pipeline; from holitom_hf import HoliTomConfig",
        "from holitom_hf import VideoTextToTextPipeline",
        "from holitom_hf.models.llava_onevision.modeling import HoliTomLlavaOnevisionModel",
        "from holitom_hf.models.pipeline import VideoTextToTextPipeline",
    ],
)
def test_the_task_is_known_in_whichever_order_things_are_imported(code):
    result = run(
        f"{code}\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "task = PIPELINE_REGISTRY.supported_tasks['video-text-to-text']\n"
        "import holitom_hf\n"
        "assert task['impl'] is holitom_hf.VideoTextToTextPipeline\n"
        "print([cls.__name__ for cls in task['pt']])\n"
    )
    names = [backbone.generation for backbone in backbones().values()]
    assert result.stdout.strip() == str(names), result.stderr
    assert "already registered" not in result.stderr


def test_public_names_are_there_and_no_others():
    for name in holitom_hf.__all__:
        assert getattr(holitom_hf, name).__name__ == name
    assert set(holitom_hf.__all__) <= set(dir(holitom_hf))
    with pytest.raises(AttributeError, match="has no attribute 'HoliTom'"):
        holitom_hf.HoliTom  # noqa: B018


def test_the_functions_of_0_1_are_still_where_they_were():
    from holitom_hf import inner_merging, merging, temporal_segmentation, token_merging

    assert temporal_segmentation.segment_frames is merging.segment_frames
    assert token_merging.merge_video_tokens is merging.merge_video_tokens
    assert inner_merging.merge_hidden_states is merging.merge_hidden_states
