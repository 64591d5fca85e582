"""Everything that somebody hostile would try is stopped, and SECURITY.md has the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from attempts import CATEGORIES, EXECUTED, Attempt

SECURITY = Path(__file__).parents[2] / "SECURITY.md"
STOPPED: dict[str, int] = {}


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line that is seen whether tests pass or fail."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="")

    return say


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_attempt_is_stopped(
    category: str, tmp_path_factory: pytest.TempPathFactory, said: Callable[[str], None]
) -> None:
    through = [attempt.name for attempt in CATEGORIES[category] if not is_stopped(attempt, tmp_path_factory)]
    tried = len(CATEGORIES[category])
    said(f"{category}: tried {tried}, stopped {tried - len(through)}")
    assert through == []


def is_stopped(attempt: Attempt, folders: pytest.TempPathFactory) -> bool:
    folder = folders.mktemp("attempt")
    return attempt.stopped(folder) and not (folder / EXECUTED).exists()


def test_the_table_of_security_md_has_these_numbers() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \|$", SECURITY.read_text(), re.MULTILINE)
    assert rows == [(name, str(len(tried)), str(len(tried))) for name, tried in CATEGORIES.items()]
