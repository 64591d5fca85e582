"""An expression has one ``for``, and a comprehension no ternary: intermediates have names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rayalign"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def dense(source: str) -> Iterator[int]:
    """Lines of comprehensions with a second ``for``, another comprehension or a ternary inside."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, COMPREHENSIONS):
            inner = [own for own in ast.walk(node) if own is not node and isinstance(own, (*COMPREHENSIONS, ast.IfExp))]
            if inner or len(node.generators) > 1:
                yield node.lineno


def test_expressions_are_written_out() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if [*dense(path.read_text("utf-8"))]
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = [a for b in c for a in b]", [1]),
        ("x = [sum(d for d in b) for b in c]", [1]),
        ("x = [\n    1 if b else 2\n    for b in c\n]", [1]),
        ("x = any(b for b in c)\ny = [b for b in c if b] if c else []", []),
    ],
)
def test_dense_expressions_are_seen(source: str, lines: list[int]) -> None:
    assert list(dense(source)) == lines
