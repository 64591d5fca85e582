"""Every command of the documentation does what the page says, or says why it is not run here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented_files import undocumented
from documented_runs import idle_runs
from pages import (
    COMMANDS,
    LANGUAGES,
    PAGES,
    REPOSITORY,
    Block,
    arguments,
    blocks,
    copy_examples,
    missing_lines,
    page_id,
)
from workspaces import rayalign

ALL = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(block.is_run for block in blocks(page))]
SLOW = [page for page in RUN if any("slow" in block.marks for block in blocks(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a user stands in: the examples of a clone, and nothing that other tests import."""
    copy_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    before, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert [f"{block}: {block.language or 'no language'}" for block in ALL if block.language not in LANGUAGES] == []


def test_marks_stand_where_they_mean_something() -> None:
    """Commands that are not run say why, and nothing else is excused."""
    of_commands = {"not run", "slow", "fails"}
    assert [str(block) for block in ALL if block.language != COMMANDS and of_commands & block.marks.keys()] == []
    assert [str(block) for block in ALL if block.language == COMMANDS and {"file", "output"} & block.marks.keys()] == []
    reasons = {
        str(block): block.marks.get(name) for block in ALL for name in ("not run", "slow") if name in block.marks
    }
    assert [place for place, reason in reasons.items() if not reason] == []


@pytest.mark.parametrize("page", RUN, ids=page_id)
def test_commands(page: Path, folder: Path) -> None:
    """Up to a page's first slow command, in this process where it is ``rayalign`` itself."""
    found = blocks(page)
    slow = next((number for number, block in enumerate(found) if "slow" in block.marks), len(found))
    follow(found[:slow], folder, here=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("page", SLOW, ids=page_id)
def test_slow_commands(page: Path, folder: Path) -> None:
    """The whole page, in a shell; ``runs`` holds files that the reference names, and no run that learned nothing."""
    follow(blocks(page), folder, here=False)
    assert undocumented(folder / "runs") == []
    assert idle_runs(folder / "runs") == []


def follow(found: list[Block], folder: Path, *, here: bool) -> None:
    """Do what a reader of the page does."""
    printed = ""
    for block in found:
        if "file" in block.marks:
            target = folder / block.marks["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.is_run:
            code, printed = do(block, folder, here=here)
            assert code == int(block.marks.get("fails", 0)), f"{block}: exit code {code}\n{printed}"
        elif "output" in block.marks:
            missing = missing_lines(block.text, printed)
            assert not missing, f"{block}: not printed: {missing}; printed was\n{printed}"


def do(block: Block, folder: Path, *, here: bool) -> tuple[int, str]:
    """(exit code, what was printed) of a block's commands."""
    parsed = [arguments(command) for command in block.commands]
    if here and all(parsed):
        return in_this_process([own for own in parsed if own is not None], folder)
    return in_a_shell(block, folder)


def in_this_process(commands: list[tuple[list[str], str]], folder: Path) -> tuple[int, str]:
    everything = ""
    for words, target in commands:
        finished = rayalign(*words)
        if target:
            (folder / target).write_text(finished.printed, encoding="utf-8")
        else:
            everything += finished.printed
        if finished.code:
            return finished.code, everything
    return 0, everything


def in_a_shell(block: Block, folder: Path) -> tuple[int, str]:
    own = Path(sys.executable).parent
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": path,
            "RAY_ADDRESS": "local",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout
