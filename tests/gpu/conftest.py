"""Tests of a CUDA device. ``RAYALIGN_GPU_TESTS=cpu`` runs those on the CPU that mean something there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REHEARSED = os.environ.get("RAYALIGN_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is marked ``gpu``, and skipped where there is no CUDA device."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or REHEARSED):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu on a machine that has one"))


@pytest.fixture
def device() -> torch.device:
    """What is tested; the CPU in a rehearsal."""
    return torch.device("cpu" if REHEARSED else "cuda")


@pytest.fixture
def cuda() -> torch.device:
    """For what only a CUDA device has."""
    if REHEARSED:
        pytest.skip("a rehearsal on the CPU: needs a CUDA device")
    return torch.device("cuda")
