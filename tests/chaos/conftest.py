"""What every test of this folder adds up to: one table at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_modules import write_modules
from incidents import Incident
from local_ray import local_session
from workspaces import Workspace, make_workspace

from rayalign.runtime.session import Session

ELSEWHERE = (
    "a prompt that kills every actor: tests/ray/test_rollouts.py",
    "a worker of DeepSpeed, of LoRA: tests/ray/test_strategies.py; of PPO: tests/ray/test_ppo_cli.py",
    "a process of a stage, torn shards: tests/ray/test_stages.py",
    "the driver of a comparison: tests/ray/test_killed_comparison.py",
    "a node lost for good: tests/ray/test_elastic.py; taken back: test_taken_back.py; of a pool: test_autoscaling.py",
    "all nodes of a run: tests/ray/test_objects_cli.py; the head of the cluster: tests/ray/test_jobs.py",
)

HEADS = ["fault", "injected", "recoveries", "lost groups", "repeated", "curve", "seconds to recover (median / most)"]
TABLE = pytest.StashKey[list[Incident]]()


@pytest.fixture
def incidents(pytestconfig: pytest.Config) -> list[Incident]:
    """Rows of the table at the end."""
    return pytestconfig.stash.setdefault(TABLE, [])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    write_modules(folder)
    return make_workspace(folder, test_data / "hh_harmless_test.jsonl.gz", num_pairs=200)


@pytest.fixture(scope="module")
def session(workspace: Workspace) -> Iterator[Session]:
    with local_session(workspace.folder) as session:
        yield session


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(TABLE, [])
    if not found:
        return
    rows = [HEADS, *(incident.cells() for incident in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    terminalreporter.section("faults")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    terminalreporter.line("")
    for line in ELSEWHERE:
        terminalreporter.line(f"also tested: {line}")
