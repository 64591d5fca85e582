"""``torch.distributed`` stays inside the engine and the runtime.

Import contracts see root packages only, so this wall is ruff's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SPELLINGS = (
    "import torch.distributed as dist",
    "from torch import distributed",
    "from torch.distributed import all_reduce",
    "def f():\n    import torch.distributed",
    "import torch\n\nrank = torch.distributed.get_rank()",
)


def is_banned(source: str, file: str) -> bool:
    """Whether ruff, with the project's configuration, reports a banned interface for ``source`` stored as ``file``."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=TID251", f"--stdin-filename={file}", "-"]
    run = subprocess.run(command, cwd=REPOSITORY, input=source, capture_output=True, text=True, timeout=60)
    assert run.returncode in (0, 1), run.stderr
    assert ("TID251" in run.stdout) == (run.returncode == 1), run.stdout
    return run.returncode == 1


@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize("file", ["rayalign/methods/planted.py", "rayalign/run/planted.py", "examples/planted.py"])
def test_torch_distributed_is_banned_outside(file: str, source: str) -> None:
    assert is_banned(source, file)


@pytest.mark.parametrize("file", ["rayalign/engine/planted.py", "rayalign/runtime/planted.py"])
def test_torch_distributed_is_allowed_inside(file: str) -> None:
    assert not any(is_banned(source, file) for source in SPELLINGS)


def test_plain_torch_is_allowed_everywhere() -> None:
    assert not is_banned("import torch\nfrom torch import Tensor\n", "rayalign/methods/planted.py")
