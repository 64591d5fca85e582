"""No module of rayalign imports itself through others, and a planted circle is found."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def module_name(path: Path, root: Path) -> str:
    """``rayalign/engine/__init__.py`` as ``rayalign.engine``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def runtime_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is loaded: not those of functions, nor those for the type checker."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            yield from runtime_imports(node.orelse if is_for_types else node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from runtime_imports(node.body + node.orelse + node.finalbody)
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from runtime_imports(node.body)


def imported(node: ast.Import | ast.ImportFrom, modules: set[str]) -> set[str]:
    """The modules of ``modules`` that one statement loads; a name from a package may itself be a module."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules
    below = {f"{node.module}.{alias.name}" for alias in node.names}
    inner = below & modules
    return inner if len(inner) == len(below) else inner | ({node.module or ""} & modules)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module → the modules of ``root/rayalign`` that it imports when it is loaded."""
    paths = {module_name(path, root): path for path in sorted((root / "rayalign").rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [imported(node, set(paths)) for node in runtime_imports(tree.body)]
        graph[name] = set().union(*found) - {name}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, first module twice; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph(REPOSITORY)
    assert "rayalign.engine.model.head" in graph["rayalign.engine.model.forward"]
    assert len(graph) > 200
    assert cycle(graph) == []


@pytest.mark.parametrize(
    ("first", "second", "is_circle"),
    [
        ("from rayalign.engine import b", "from rayalign.engine.a import x", True),
        (
            "import rayalign.engine.b",
            "try:\n    from rayalign.engine import a\nexcept ImportError:\n    a = None",
            True,
        ),
        ("from rayalign.engine.b import x", "def f():\n    from rayalign.engine import a", False),
        (
            "from rayalign.engine.b import x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rayalign.engine.a import y",
            False,
        ),
    ],
)
def test_a_planted_circle_is_found(first: str, second: str, *, is_circle: bool, tmp_path: Path) -> None:
    folder = tmp_path / "rayalign" / "engine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "a.py").write_text(first + "\n")
    (folder / "b.py").write_text(second + "\n")
    found = cycle(import_graph(tmp_path))
    assert set(found) == ({"rayalign.engine.a", "rayalign.engine.b"} if is_circle else set())
