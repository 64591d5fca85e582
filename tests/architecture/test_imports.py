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


def lint(root: Path) -> str:
    """What the linter says of the package under ``root``."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert LAYERS in run.stdout and RAY in run.stdout, run.stdout + run.stderr
    assert ("BROKEN" in run.stdout) == (run.returncode != 0)
    return run.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "rayalign", tmp_path / "rayalign", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_walls_stand() -> None:
    assert "BROKEN" not in lint(REPOSITORY)


@pytest.mark.parametrize(
    ("contract", "planted"),
    [
        (
            RAY,
            {
                "methods/one.py": "import ray",
                "methods/two.py": "def f():\n    from ray import train",
                "engine/one.py": "import ray.train",
                "one.py": "import ray",
            },
        ),
        (
            LAYERS,
            {
                "methods/one.py": "from rayalign import engine",
                "config/one.py": "import rayalign.data",
                "report/one.py": "import rayalign.runtime",
            },
        ),
    ],
)
def test_every_planted_import_is_found(copy: Path, contract: str, planted: dict[str, str]) -> None:
    for file, line in planted.items():
        (copy / "rayalign" / file).write_text(line + "\n")
    said = lint(copy)
    assert [f"{name} BROKEN" in said for name in (LAYERS, RAY)] == [name == contract for name in (LAYERS, RAY)]
    for file in planted:
        module = "rayalign." + file.removesuffix(".py").replace("/", ".")
        assert f"{module} -> " in said, said
