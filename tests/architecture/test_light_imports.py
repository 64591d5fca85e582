"""Reading a configuration, a report or a help text starts neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "deepspeed")


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded once ``code`` has run; ``code`` may exit with status 0."""
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules]))\n"
        f"{code}\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    marker, *names = run.stdout.splitlines()[-1].split()
    assert marker == "LOADED"
    return set(names)


@pytest.mark.parametrize(
    "name",
    ["rayalign", "rayalign.cli", "rayalign.config", "rayalign.methods", "rayalign.report", "rayalign.verbs.doctor"],
)
def test_import_is_light(name: str) -> None:
    assert loaded_by(f"import {name}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["status", "--help"], ["doctor", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    assert loaded_by("from rayalign.cli import main\nmain()", *arguments) == set()


def test_a_heavy_import_is_seen() -> None:
    assert "torch" in loaded_by("import rayalign.types")
