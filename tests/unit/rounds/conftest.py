"""What the tests of rounds share: a cache of their own, a tiny model, and ten prompts, some of them answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import save_tiny


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: None) -> None:
    """No test of rounds uses the cache of another."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs; whoever draws reads their prompts alone."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"question {n}", "chosen": f"aeiou {n}", "rejected": "xyz"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
