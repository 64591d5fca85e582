"""A key-value cache that is written in place: growing by ``torch.cat`` copies all of it at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a layer grows by at a time."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' cache with room behind its last token."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, tokens, size] to both; returns all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length = held.shape[-2] if held.numel() else 0
        total = length + new.shape[-2]
        room = self.room.get(name)
        # Rows that were repeated or left out have made another tensor, which has no room.
        if room is None or held.data_ptr() != room.data_ptr() or total > room.shape[-2]:
            room = torch.empty((*new.shape[:-2], total + ROOM, new.shape[-1]), dtype=new.dtype, device=new.device)
            if length:
                room[..., :length, :] = held
            self.room[name] = room
        room[..., length:total, :] = new
        return room[..., :total, :]


def keep_cache_rows(cache: DynamicCache | None, rows: Tensor) -> None:
    """Keep ``rows`` of every layer, in their order; a row may come several times, and a layer may be of any kind."""
    if cache is not None:
        cache.reorder_cache(rows)


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model of ``config``; layers of other kinds than plain ones are transformers' own."""
    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = RoomyLayer()
    return cache
