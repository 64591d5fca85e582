"""What a pool calls its items in messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.engine.model.pretrained import ModelSpec
from rayalign.rounds.chunk import Chunk
from rayalign.runtime.pool import described

CHUNK = Chunk(name="0000000008", positions=range(8, 16), directory=Path("rounds"), weights=None)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (("how it is made", CHUNK), "the prompts at positions 8 to 15"),
        (ModelSpec(name="gpt2"), "gpt2"),
        (Path("checkpoints/step_000100"), "step_000100"),
        ("rest", "rest"),
    ],
)
def test_an_item_is_called_what_a_person_would_call_it(item: object, expected: str) -> None:
    assert described(item) == expected
