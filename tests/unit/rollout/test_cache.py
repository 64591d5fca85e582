"""The cache that is written in place holds what transformers' own would."""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from rayalign.rollout.cache import ROOM, RoomyLayer, make_cache

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)


def test_appending_repeating_and_leaving_out() -> None:
    ours, theirs = make_cache(CONFIG), DynamicCache(config=CONFIG)
    generator = torch.Generator().manual_seed(0)
    rows = 3

    def append(tokens: int) -> None:
        for layer in range(2):
            new = torch.randn(2, rows, 2, tokens, 8, generator=generator)
            found, expected = ours.update(*new, layer), theirs.update(*new, layer)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])

    append(5)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(4)
    rows = 12
    for _ in range(ROOM + 3):  # beyond its room
        append(1)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([0, 3, 4, 11]))
    rows = 4
    for _ in range(3):
        append(1)
    assert ours.get_seq_length() == theirs.get_seq_length() == 5 + ROOM + 6


def test_a_token_is_appended_without_a_copy_of_the_others() -> None:
    layer = RoomyLayer()
    layer.update(torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 4))
    before = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4))
    assert layer.keys.data_ptr() == before and layer.keys.shape == (2, 2, 7 + ROOM, 4)


def test_windows_keep_their_own_layers() -> None:
    config = MistralConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, sliding_window=4)
    (layer,) = make_cache(config).layers
    assert type(layer) is DynamicSlidingWindowLayer
