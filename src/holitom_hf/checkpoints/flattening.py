"""
From a package to flat files, which is all that transformers' dynamic modules know.

What a backbone's entry files import, directly or not, is found in their syntax trees. Each module is written under
its joined name (`merging/spatial.py` becomes `merging_spatial.py`), with its imports rewritten to match. Comments and
docstrings of functions are left out, and a module's single line where a class has a docstring; the others are cut to
their first sentence, blank lines left out where there are two, or an import or an indented line follows: whoever reads
a checkpoint's code finds the rest in the file that its first line names.
"""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

from .backbone import ENTRIES, Backbone


ROOT = Path(__file__).parents[1]
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@functools.cache
def flat_package(backbone: Backbone) -> dict[str, str]:
    """The flat modules of a backbone's checkpoints, and their sources."""
    folder = ROOT / "models" / backbone.model_type
    files = (
        folder / "configuration.py",
        folder / "modeling.py",
        folder / "processing.py",
        ROOT / "models/pipeline.py",
    )
    return flatten(ROOT, dict(zip(ENTRIES, files)))


def flatten(root: Path, entries: dict[str, Path]) -> dict[str, str]:
    """
    Modules and all that they import relatively, as flat modules.

    Args:
        root: Folder under which all of them lie.
        entries: Files to start from, and what to call them.

    Returns:
        Sources by flat name.

    Raises:
        ImportError: If an import can't be followed: not from a module's file, of a name it does not have, or two files
            have the same flat name.
    """
    name_of = {file: name for name, file in entries.items()}
    waiting, sources, trees = list(entries.values()), {}, {}
    while waiting:
        file = waiting.pop()
        name = name_of[file]
        if name in sources:
            continue
        source = file.read_text(encoding="utf-8")
        lines, tree = source.split("\n"), ast.parse(source)
        for node in _relative_imports(tree):
            imported = _imported_file(file, node)
            if imported not in name_of:
                flat = "_".join(imported.relative_to(root).with_suffix("").parts)
                if flat in name_of.values():
                    raise ImportError(f"two modules would be called {flat}.py in a checkpoint; one is {imported}")
                name_of[imported] = flat
            waiting.append(imported)
            lines[node.lineno - 1] = _with_module(lines[node.lineno - 1], node, name_of[imported], file)
        _shorten_docstrings(lines, tree)
        _leave_out_comments(lines, source)
        origin = file.relative_to(root).as_posix()
        text = "\n".join([f"# holitom_hf/{origin}", *(line for line in lines if line is not None)])
        sources[name] = re.sub(r"\n{3,}", "\n\n", re.sub(r"\n{2,}(?=from |import |    )", "\n", text))
        trees[name] = ast.parse(sources[name])
    _check_imports(trees)
    return sources


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def _imported_file(file: Path, node: ast.ImportFrom) -> Path:
    if node.module is None:
        raise ImportError(f"{file}, line {node.lineno}: a checkpoint's code imports names from modules only")
    imported = file.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
    if not imported.is_file():
        raise ImportError(f"{file}, line {node.lineno}: there is no {imported}, and packages have no flat form")
    return imported


def _with_module(line: str, node: ast.ImportFrom, name: str, file: Path) -> str:
    """The line on which an import statement starts, with the flat name of its module."""
    before, statement = line[: node.col_offset], line[node.col_offset :]
    rewritten, count = re.subn(r"^from\s+\.+[\w.]*\s+import\b", f"from .{name} import", statement)
    if count == 0:
        raise ImportError(f"{file}, line {node.lineno}: module and `import` must stand on one line")
    return before + rewritten


def _shorten_docstrings(lines: list[str | None], tree: ast.Module) -> None:
    """
    Takes out docstrings of functions, and a module's single line where a class has one of its own; cuts those of
    modules and classes to their first sentence (or paragraph, if that has no full stop). Lines that go become `None`.
    """
    has_class = any(isinstance(node, ast.ClassDef) and ast.get_docstring(node) for node in tree.body)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, *SCOPES)) or ast.get_docstring(node) is None:
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno - 1
        is_repeated = isinstance(node, ast.Module) and has_class and first == last
        if is_repeated or (not isinstance(node, ast.Module | ast.ClassDef) and len(node.body) > 1):
            lines[first : last + 1] = [None] * (last + 1 - first)
            continue
        start = first + 1 if lines[first].strip() == '"""' else first
        end = next((number for number in range(start, last) if not lines[number].strip()), last + 1)
        for number in range(start, end):
            if sentence := re.match(r'.*?\.(?=\s|"""|$)', lines[number]):
                lines[number], end = sentence[0], number + 1
                break
        if not lines[end - 1].endswith('"""'):
            lines[end - 1] += '"""'
        lines[end : last + 1] = [None] * (last + 1 - end)
        if start > first:
            lines[first], lines[start] = None, lines[first] + lines[start].lstrip()


def _leave_out_comments(lines: list[str | None], source: str) -> None:
    """Takes out comments; lines that hold nothing else become `None`."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number = token.start[0] - 1
            is_alone = not token.line[: token.start[1]].strip()
            lines[number] = None if is_alone else lines[number].removesuffix(token.string).rstrip()


def _check_imports(trees: dict[str, ast.Module]) -> None:
    """Raises an `ImportError` where a flat module asks another one for something that is not in it."""
    defined = {name: _defined_names(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        for node in _relative_imports(tree):
            missing = {alias.name for alias in node.names} - defined.get(node.module, set())
            if node.level != 1 or missing:
                raise ImportError(f"{name}.py imports {', '.join(sorted(missing))} from {node.module}.py in vain")


def _defined_names(tree: ast.Module) -> set[str]:
    """Names that a module has at its top level."""
    names = set()
    for node in ast.walk(ast.Module([n for n in tree.body if not isinstance(n, SCOPES)], [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names | {node.name for node in tree.body if isinstance(node, SCOPES)}
