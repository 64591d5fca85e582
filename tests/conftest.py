"""Fixtures that every test may use. Shape annotations are checked while tests run."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    ["rayalign.types", "rayalign.functional", "rayalign.methods", "rayalign.engine", "rayalign.data.pack"],
    "beartype.beartype",
)

REPOSITORY = Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True)  # or xdist would read the groups first
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Of processes that share the tests, one runs all that start a Ray, and each file is run by one."""
    if hasattr(config, "workerinput"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.name))
    yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real preference pairs (``RAYALIGN_TEST_DATA``); tests that need it skip without it."""
    folder = Path(os.environ.get("RAYALIGN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "hh_harmless_test.jsonl.gz").exists():
        pytest.skip(f"no hh_harmless_test.jsonl.gz in {folder}: set RAYALIGN_TEST_DATA to the folder that holds it")
    return folder
