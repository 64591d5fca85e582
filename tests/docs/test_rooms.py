"""The picture of the rooms is the contract of the imports, and every room says what is in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pages import REPOSITORY, page_id

PACKAGE = REPOSITORY / "rayalign"
PAGE = REPOSITORY / "docs" / "explanation" / "architecture.md"
ROOMS = sorted(file.parent for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)


def layers() -> list[set[str]]:
    """The rooms of every layer, top to bottom; the command line is one layer of two modules."""
    [contract] = [
        own
        for own in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if own["type"] == "layers"
    ]
    found = [set(line.replace("rayalign.", "").split(" | ")) for line in contract["layers"]]
    return [names for names in found if names != {"cli_export"}]


def test_the_picture_is_the_contract() -> None:
    picture = PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    drawn = [re.findall(r"^(\w+)(?: │ (\w+))?", line)[0] for line in picture.splitlines() if line[:1].isalpha()]
    assert [{name for name in names if name} for names in drawn] == layers()


def test_every_path_that_the_page_names_exists() -> None:
    """``data/store.py`` is below ``rayalign``, ``examples/dpo_in_one_file.py`` below the repository."""
    named = set(re.findall(r"`(?:rayalign/)?((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 40
    assert {path for path in named if not any((root / path).exists() for root in (PACKAGE, REPOSITORY))} == set()


@pytest.mark.parametrize("room", ROOMS, ids=page_id)
def test_a_room_says_what_is_in_it(room: Path) -> None:
    lines = (room / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    named = re.findall(r"`(\w+\.py)`", "\n".join(lines))
    assert [name for name in named if not (room / name).exists()] == []
