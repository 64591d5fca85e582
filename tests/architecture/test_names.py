"""A public name stands for one thing in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rayalign"
COMMANDS = {"__main__.py", "cli.py", "cli_export.py"}
"""Their functions are called as what they start."""


def public_names(path: Path) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}
    return {name for name in found if not name.startswith("_")}


def test_no_two_modules_define_one_name() -> None:
    """Methods are left aside, whose records all want a ``loss``; and a program has its ``main``."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        if where.parts[0] != "methods" and str(where) not in COMMANDS:
            for name in public_names(path) - {"main"}:
                places[name].append(str(where))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
