"""The import walls of pyproject.toml hold, and would be seen to fall."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LAYERS = "Rooms, top to bottom"
RAY = "Only rayalign.runtime imports ray"


def broken_contracts(root: Path) -> set[str]:
    """The names of the import contracts that the package under ``root`` breaks."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert LAYERS in run.stdout and RAY in run.stdout, run.stdout + run.stderr
    broken = {name for name in (LAYERS, RAY) if f"{name} BROKEN" in run.stdout}
    assert bool(broken) == (run.returncode != 0)
    return broken


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "rayalign", tmp_path / "rayalign", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_walls_stand() -> None:
    assert broken_contracts(REPOSITORY) == set()


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("methods/planted.py", "import ray", RAY),
        ("methods/planted.py", "def f():\n    from ray import train", RAY),
        ("engine/planted.py", "import ray.train", RAY),
        ("planted.py", "import ray", RAY),
        ("methods/planted.py", "from rayalign import engine", LAYERS),
        ("config/planted.py", "import rayalign.data", LAYERS),
        ("report/planted.py", "import rayalign.runtime", LAYERS),
    ],
)
def test_a_planted_import_breaks_one_wall(copy: Path, file: str, line: str, contract: str) -> None:
    (copy / "rayalign" / file).write_text(line + "\n")
    assert broken_contracts(copy) == {contract}
