"""A run that is legal, and what happens when one of its lines is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.config import ConfigError, load_run

MINIMAL = "model: {name: gpt2}\ndata: {train: pairs.jsonl}\n"

Refused = Callable[..., list[str]]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Load YAML lines (after ``MINIMAL``'s two) and return the messages, without the folder."""

    def load(text: str, *overrides: str, minimal: str = MINIMAL) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(minimal + text)
        with pytest.raises(ConfigError) as caught:
            load_run(path, overrides)
        assert str(caught.value) == "\n".join(map(str, caught.value.problems))
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return load
