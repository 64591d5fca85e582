"""The prompts of a token store as its rows had them: for scorers and people, where the model reads token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rayalign.data.schema import Turns
from rayalign.data.shard import PROMPTS
from rayalign.data.split import prompt_text
from rayalign.data.store import TokenStore
from rayalign.manifest import TornDirectory

SHARDS_IN_MEMORY = 8


class Prompts:
    """By row of the store; a shard's prompts are read together and a few shards are remembered.

    Raises TornDirectory where the store has no prompts, as one that was written by an earlier release.
    """

    def __init__(self, store: TokenStore) -> None:
        self.tokens = store.tokens
        self._shard = lru_cache(maxsize=SHARDS_IN_MEMORY)(read_prompts)

    def __getitem__(self, row: int) -> str | Turns:
        number = self.tokens.shard_of(row)
        return self._shard(self.tokens.paths[number].with_suffix(PROMPTS))[row - self.tokens.shards[number].first]

    def text(self, row: int) -> str:
        """What a scorer reads."""
        return prompt_text(self[row])


def read_prompts(path: Path) -> Sequence[str | Turns]:
    if not path.is_file():
        raise TornDirectory(f"{path} is missing: make the store again with --fresh tokens")
    prompts: list[str | Turns] = json.loads(path.read_text(encoding="utf-8"))
    return prompts
