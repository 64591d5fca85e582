"""The page of families says what is tried: a part of it in every week, all of it in the slow tests."""

from __future__ import annotations

import datetime
import zlib
from pathlib import Path

import pytest
from causal_zoo import NOT_MADE, TYPES
from family_table import reading_of, written

from rayalign.engine.model.loading import quiet_transformers

PARTS = 12


def part_of(model_type: str) -> int:
    return zlib.crc32(model_type.encode()) % PARTS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))


def test_every_type_has_a_row() -> None:
    assert written().keys() == {*TYPES, *NOT_MADE}


def check(types: list[str]) -> None:
    page = written()
    with quiet_transformers():
        found = {name: reading_of(name) for name in types}
    assert found == {name: page[name] for name in types}, "run: python tests/fixtures/family_table.py"


def test_the_types_of_this_week_are_read_as_the_page_says() -> None:
    week = datetime.date.today().isocalendar().week % PARTS
    check([name for name in TYPES if part_of(name) == week])


@pytest.mark.slow
def test_all_types_are_read_as_the_page_says() -> None:
    check(list(TYPES))
