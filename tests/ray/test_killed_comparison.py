"""The driver of a comparison killed at random moments: whatever is left of its work, the results are the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from local_head import Head, local_head

COMPARE = Path(__file__).parents[2] / "examples" / "own_method" / "compare.yaml"
SETTINGS = (
    "initial.optim.steps=3",
    "initial.optim.warmup=1",
    "base.optim.steps=4",
    "base.optim.warmup=1",
    "base.checkpoint.every=1",
    "base.evaluate.at=[2, 4]",
    "base.evaluate.sampling.max_new_tokens=8",
)
KILLS = 10
CLOCKS = ("times", "provenance")
"""Of results.json, what says when and how they came to be."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def start(head: Head, storage: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rayalign", "compare", str(COMPARE), *SETTINGS]
    command += [f"initial.storage_path={storage}", f"base.storage_path={storage}"]
    environment = {**head.variables(), "RAY_ADDRESS": head.address}
    return subprocess.Popen(
        command, cwd=head.storage, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def ends(driver: subprocess.Popen[bytes], *, within: float) -> bool:
    """Whether a driver came to its end; one that did not is killed."""
    try:
        errors = driver.communicate(timeout=within)[1]
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.communicate()
        return False
    assert driver.returncode == 0, errors.decode()[-3000:]
    return True


def results(storage: Path) -> dict[str, Any]:
    found = json.loads((storage / "own-method" / "report" / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in CLOCKS}


def test_ten_random_kills_change_no_result(tmp_path: Path) -> None:
    moments = random.Random(20)
    with local_head(tmp_path) as head:
        began = time.monotonic()
        assert ends(start(head, tmp_path / "whole"), within=900)
        whole = time.monotonic() - began
        killed = []
        while sum(killed) < KILLS:
            storage = tmp_path / f"killed-{len(killed)}"
            killed.append(0)
            while not ends(start(head, storage), within=whole * moments.uniform(0.1, 0.9)):
                killed[-1] += 1
            assert results(storage) == results(tmp_path / "whole"), f"after {killed[-1]} kills"
        print(f"{sum(killed)} kills in {len(killed)} comparisons of {whole:.0f} s: {killed}; results equal")
