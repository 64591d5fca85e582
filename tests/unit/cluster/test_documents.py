"""What the texts about clusters name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["cluster/README.md", "SECURITY.md"])
def test_files_that_are_named_exist(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    named = re.findall(r"`((?:tests|cluster|kuberay|slurm|docker)/[\w./-]+)`", text)
    assert named
    for path in named:
        assert (REPOSITORY / path).exists() or (REPOSITORY / "cluster" / path).exists(), path
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        assert ((REPOSITORY / name).parent / link).exists(), link
