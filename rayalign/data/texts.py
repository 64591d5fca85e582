"""The prompts of a token store as texts: what scorers read where the model reads token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rayalign.data.shard import PROMPTS
from rayalign.data.store import TokenStore
from rayalign.manifest import TornDirectory

SHARDS_IN_MEMORY = 8


class PromptTexts:
    """Texts by row of the store; a shard's texts are read together and a few shards are remembered.

    Raises TornDirectory where the store has no texts, as one that was written by an earlier release.
    """

    def __init__(self, store: TokenStore) -> None:
        self.tokens = store.tokens
        self._shard = lru_cache(maxsize=SHARDS_IN_MEMORY)(read_texts)

    def __getitem__(self, row: int) -> str:
        number = self.tokens.shard_of(row)
        return self._shard(self.tokens.paths[number].with_suffix(PROMPTS))[row - self.tokens.shards[number].first]


def read_texts(path: Path) -> Sequence[str]:
    if not path.is_file():
        raise TornDirectory(f"{path} is missing: make the store again with --fresh tokens")
    texts: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return texts
