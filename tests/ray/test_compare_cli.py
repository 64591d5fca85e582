"""A comparison from the command line: an initial run, two cells (one of them a user's method), a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parents[2] / "examples" / "own_method" / "compare.yaml"
SMALL = (
    "initial.optim.steps=3",
    "initial.optim.warmup=1",
    "base.optim.steps=4",
    "base.optim.warmup=1",
    "base.evaluate.at=[4]",
    "base.evaluate.sampling.max_new_tokens=8",
    "initial.data.train[0].arguments.n=100",
    "base.data.train[0].arguments.n=64",
    "base.evaluate.prompts[0].arguments.n=16",
)

pytestmark = pytest.mark.ray


def compare(storage: Path, *options: str) -> str:
    command = [sys.executable, "-m", "rayalign", "compare", str(COMPARE), *SMALL, *options]
    command += [f"initial.storage_path={storage}", f"base.storage_path={storage}"]
    environment = {**os.environ, "COLUMNS": "250"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=storage.parent, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("compare") / "runs"
    compare(storage)
    return storage


def rows(storage: Path, cell: str) -> list[dict[str, float]]:
    text = (storage / "own-method" / "cells" / cell / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_cell_starts_at_its_reference(storage: Path) -> None:
    assert rows(storage, "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    # ln 2 and 0.01 · (0 − 2)²: the user's method at policy = reference
    assert rows(storage, "calibrated")[0]["loss"] == pytest.approx(0.693147 + 0.04, abs=1e-5)
    assert [row["step"] for row in rows(storage, "dpo")] == [1, 2, 3, 4]


def test_the_report_holds_every_cell_and_step(storage: Path) -> None:
    results = json.loads((storage / "own-method" / "report" / "results.json").read_text())
    comparison = json.loads((storage / "own-method" / "comparison.json").read_text())
    assert [(cell["id"], cell["status"]) for cell in comparison["cells"]] == [("dpo", "done"), ("calibrated", "done")]
    assert [point["step"] for point in comparison["cells"][0]["points"]] == [4]
    assert len(comparison["reference"][0]["scores"]["oracle"]) == 16
    assert comparison["reference"][0]["kl"] == {"kl_rb": [[0.0]] * 16, "k1": [[0.0]] * 16}
    assert results
    assert "<svg" in (storage / "own-method" / "report" / "report.html").read_text()


def test_cells_share_their_stages(storage: Path) -> None:
    stages = sorted(path.name.partition("-")[0] for path in (storage / "artifacts").iterdir())
    assert stages == ["reference", "rows", "rows", "rows", "tokens", "tokens"]


@pytest.mark.slow
def test_a_second_run_repeats_nothing(storage: Path) -> None:
    final = storage / "own-method" / "cells" / "dpo" / "final" / "MANIFEST.json"
    before = final.stat().st_mtime_ns
    output = compare(storage)
    assert final.stat().st_mtime_ns == before
    assert output.count("finished before") == 3
    assert "making" not in output


def test_a_plan_of_what_is_done_is_exact_and_writes_nothing(storage: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in storage.rglob("*")}
    output = compare(storage, "--dry-run", "--pilot", str(storage / "own-method"), "prices={device_hour: 2}")
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("*")} == before
    assert "6 stages for 2 cells, 3 of them shared, 6 cached" in output
    lines = [line.replace("│", " ").split() for line in output.splitlines()]
    for cell in ("dpo", "calibrated"):
        [planned, estimated] = [line for line in lines if line[:1] == [cell]]
        tokens = int(rows(storage, cell)[-1]["num_tokens"])
        assert planned[4:] == ["finished", "4", f"{tokens:,}", "0"]
        assert estimated[2:] == ["0", "0.00", "0.00", "0.00"]
