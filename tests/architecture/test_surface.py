"""What people rely on by name: methods and their documentation, the examples, the commands."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

import rayalign.cli
import rayalign.methods
from rayalign.config import load_compare, load_run
from rayalign.methods import METHODS, resolve

REPOSITORY = Path(__file__).parents[2]
METHODS_PAGE = REPOSITORY / "docs" / "explanation" / "methods.md"
EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))
COMMANDS = [
    "init",
    "check",
    "train",
    "generate",
    "score",
    "sample",
    "evaluate",
    "compare",
    "report",
    "status",
    "doctor",
    "artifacts",
    "export",
]
EXPORTS = ["alpaca_eval", "trl_pairs", "model_card"]


def documented_rows() -> dict[str, list[str]]:
    """Method → (paper, equation, file), from the table of the page about methods."""
    rows = {}
    for line in METHODS_PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and re.fullmatch(r"`\w+`", cells[0]):
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def test_methods_are_in_order() -> None:
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name: str) -> None:
    method = resolve(name)
    assert method.name == name
    assert method.paper
    assert (sys.modules[method.loss.__module__].__doc__ or "").strip()
    method.config()


@pytest.mark.parametrize("name", rayalign.methods.__all__)
def test_an_exported_name_exists(name: str) -> None:
    assert getattr(rayalign.methods, name) is not None


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_method_can_be_imported(name: str) -> None:
    module, loss = importlib.import_module(METHODS[name].partition(":")[0]), f"{name}_loss"
    assert not hasattr(module, loss) or loss in rayalign.methods.__all__


@pytest.mark.parametrize("name", METHODS)
def test_the_page_has_paper_equation_and_file_of(name: str) -> None:
    assert name in documented_rows(), f"docs/explanation/methods.md has no row of {name}"
    paper, equation, file = documented_rows()[name]
    module = METHODS[name].partition(":")[0]
    assert paper and equation
    assert module.replace(".", "/") + ".py" in file


def test_the_page_lists_no_method_that_does_not_exist() -> None:
    assert set(documented_rows()) <= set(METHODS)


@pytest.mark.parametrize("file", ["README.md", "CHANGELOG.md"])
def test_methods_are_counted(file: str) -> None:
    assert f"{len(METHODS)} methods" in (REPOSITORY / file).read_text(encoding="utf-8")


def test_the_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_an_example_can_start(path: Path) -> None:
    if "grid" in yaml.safe_load(path.read_text()):
        assert all(cell.run is not None for cell in load_compare(path).cells)
    else:
        load_run(path)


def test_there_are_examples() -> None:
    assert REPOSITORY / "examples" / "quickstart.yaml" in EXAMPLES


def test_the_commands_are_frozen() -> None:
    assert list(typer.main.get_command(rayalign.cli.app).commands) == COMMANDS
    assert list(typer.main.get_command(rayalign.cli.exports).commands) == EXPORTS
