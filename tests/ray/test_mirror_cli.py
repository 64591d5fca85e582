"""A run from the command line whose folder is lost, and one that has rounds."""

from __future__ import annotations

import json
import shutil

import pytest
from workspaces import Workspace, metrics, rayalign, weights

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_same_command_goes_on_from_the_copies(workspace: Workspace, session: Session) -> None:
    copies = workspace.folder / "copies"
    path = workspace.run("mirrored", checkpoint={"every": 5, "mirror": f"file://{copies}"})
    done = rayalign("train", path)
    assert done.code == 0, done.printed
    directory = workspace.directory("mirrored")
    kept = sorted(each.name for each in (directory / "checkpoints").iterdir())
    assert sorted(each.name for each in (copies / "mirrored" / "checkpoints").iterdir()) == kept and len(kept) == 2
    assert json.loads((copies / "mirrored" / "run.json").read_text())["status"] == "finished"
    expected, curve = weights(directory), metrics(directory)

    shutil.rmtree(directory)
    shutil.rmtree(copies / "mirrored" / "checkpoints" / kept[-1])  # the last one was not sent in time
    again = rayalign("train", path)
    assert again.code == 0, again.printed
    assert f"fetched {kept[0]} from file://" in again.printed.replace("\n", ""), again.printed
    assert weights(directory) == expected and metrics(directory) == curve
    assert json.loads((directory / "run.json").read_text())["attempts"] == 2
    names = [each.name[:11] for each in (copies / "mirrored" / "checkpoints").iterdir()]
    assert sorted(names) == sorted(name[:11] for name in kept)


def test_another_run_in_the_copies_is_refused(workspace: Workspace, session: Session) -> None:
    mirror = {"every": 5, "mirror": f"file://{workspace.folder / 'copies'}"}
    path = workspace.run("mirrored", checkpoint=mirror, method={"name": "dpo", "beta": 0.7})
    shutil.rmtree(workspace.directory("mirrored"))
    refused = rayalign("train", path)
    assert refused.code == 2 and "method.beta" in refused.printed, refused.printed
    assert "was written by another run" in refused.printed.replace("\n", " ")
