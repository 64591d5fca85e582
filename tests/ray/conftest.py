"""One Ray and one workspace for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_ray import local_session
from workspaces import Workspace, make_workspace

from rayalign.runtime.session import Session


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    return make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=200)


@pytest.fixture(scope="module")
def session(workspace: Workspace) -> Iterator[Session]:
    with local_session(workspace.folder) as session:
        yield session
