"""What a pool calls its items in messages, and how often it does again what died with its actor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from rayalign.config.model import ModelConfig
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.rounds.chunk import PromptChunk
from rayalign.rounds.workers import ItemKilled
from rayalign.runtime.failures import retry_lost_actors
from rayalign.runtime.pool import item_in_words

CHUNK = PromptChunk(name="0000000008", positions=range(8, 16), directory=Path("rounds"), weights=None)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (("how it is made", CHUNK), "the prompts at positions 8 to 15"),
        (ModelSpec(config=ModelConfig(name="gpt2")), "gpt2"),
        (Path("checkpoints/step_000100"), "step_000100"),
        ("rest", "rest"),
    ],
)
def test_an_item_is_called_what_a_person_would_call_it(item: object, expected: str) -> None:
    assert item_in_words(item) == expected


@pytest.mark.parametrize("deaths", [0, 3])
def test_what_died_with_its_actor_is_done_again(deaths: int) -> None:
    """Up to three times, as four attempts allow."""
    assert retry_lost_actors("tokens", dying(deaths), what="shard 3") == "done"


def test_what_kills_every_actor_is_told_with_its_name() -> None:
    told = "^tokens: a process died in each of 4 attempts at shard 3, as it does when memory runs out: it was killed"
    with pytest.raises(ItemKilled, match=told):
        retry_lost_actors("tokens", dying(4), what="shard 3")


def dying(deaths: int) -> Callable[[], str]:
    """Work whose actor dies that often before it succeeds."""
    left = [RayActorError(error_msg="it was killed") for _ in range(deaths)]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    return work
