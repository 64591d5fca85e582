"""Fixtures that every test may use. Shape annotations are checked while tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    ["rayalign.types", "rayalign.functional", "rayalign.methods", "rayalign.engine", "rayalign.data.pack"],
    "beartype.beartype",
)

REPOSITORY = Path(__file__).parents[1]


@pytest.hookimpl(optionalhook=True)  # tests also run one after another, without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file is run by one of the processes that share the tests; files that start a Ray all by the same one."""
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    file_of = scheduler._split_scope

    def group(nodeid: str) -> str:
        file = file_of(nodeid)
        return "ray" if file.startswith("tests/ray/") else file

    scheduler._split_scope = group  # the one place where xdist lets files be put together
    return scheduler


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of a node that no other module of tests uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real preference pairs (``RAYALIGN_TEST_DATA``); tests that need it skip without it."""
    folder = Path(os.environ.get("RAYALIGN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "hh_harmless_test.jsonl.gz").exists():
        pytest.skip(f"no hh_harmless_test.jsonl.gz in {folder}: set RAYALIGN_TEST_DATA to the folder that holds it")
    return folder
