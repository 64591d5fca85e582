"""The rule of who sees whom, spelled out token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_groups import random_groups
from tiny_models import FAMILIES, WINDOW, tiny
from torch.nn.attention.flex_attention import create_mask

from rayalign.data.pack import pack
from rayalign.engine.model.attention import (
    CONCATENATED_ONLY,
    FLEX,
    Reach,
    additive_mask,
    attention_inputs,
    attention_kinds,
    block_mask,
    reaches,
)
from rayalign.engine.model.group_attention import GROUP_ATTENTION
from rayalign.types import PackedBatch

REACHES = {
    "all": Reach(),
    "window": Reach(window=3),
    "chunk": Reach(chunk=4),
    "window and chunk": Reach(window=3, chunk=4),
}


@pytest.fixture
def batch() -> PackedBatch:
    """Two rows of ragged groups, the second padded."""
    groups = random_groups((2, 1, 3, 1), vocabulary=9, prompt_tokens=(2, 6), candidate_tokens=(1, 5))
    packed = pack(groups, positions=range(4), num_candidates=3, pad_id=0, row_tokens=24)
    assert packed.input_ids.shape[0] > 1 and (packed.group_ids == -1).any()
    return packed


def may_see(batch: PackedBatch, reach: Reach, row: int, q: int, kv: int) -> bool:
    group, branch, position = (ids[row].tolist() for ids in (batch.group_ids, batch.branch_ids, batch.position_ids))
    if kv > q or group[kv] != group[q]:
        return False
    if branch[kv] not in (0, branch[q]):
        return False
    if reach.window is not None and position[q] - position[kv] >= reach.window:
        return False
    return reach.chunk is None or position[q] // reach.chunk == position[kv] // reach.chunk


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_mask_follows_the_rule(batch: PackedBatch, reach: Reach) -> None:
    num_rows, length = batch.input_ids.shape
    mask = additive_mask(batch, reach, torch.float32)
    assert mask.shape == (num_rows, 1, length, length)
    for row, q, kv in itertools.product(range(num_rows), range(length), range(length)):
        expected = 0.0 if may_see(batch, reach, row, q, kv) else torch.finfo(torch.float32).min
        assert mask[row, 0, q, kv] == expected, (row, q, kv)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_block_mask_is_the_same_rule(batch: PackedBatch, reach: Reach) -> None:
    num_rows, length = batch.input_ids.shape
    blocks = block_mask(batch, reach)
    dense = create_mask(blocks.mask_mod, num_rows, 1, length, length, device="cpu")
    assert torch.equal(dense, additive_mask(batch, reach, torch.float32) == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_sees_itself_so_no_softmax_is_empty(batch: PackedBatch, dtype: torch.dtype) -> None:
    mask = additive_mask(batch, Reach(window=1), dtype)
    assert not mask.diagonal(dim1=-2, dim2=-1).any()
    assert mask.isfinite().all()
    assert mask.softmax(dim=-1).isfinite().all()


def test_reaches_follow_from_the_configuration() -> None:
    found = {name: next(iter(reaches(tiny(name).config).values())) for name in FAMILIES}
    window = Reach(window=WINDOW)
    for plain in ("llama", "gpt2", "gpt_neox", "olmo2", "mistral", "gemma", "qwen3_moe"):
        assert found[plain] == Reach(), plain
    for one_mask in ("mistral_windowed", "phi3"):
        assert found[one_mask] == window, one_mask
    for per_type in ("qwen2_windowed", "qwen3_windowed", "gemma2", "gemma3"):
        assert found[per_type] == {"full_attention": Reach(), "sliding_attention": window}, per_type
    for per_type in ("qwen2", "qwen3"):
        assert found[per_type] == {"full_attention": Reach()}, per_type
    assert found["llama4"] == {"full_attention": Reach(), "chunked_attention": Reach(chunk=WINDOW)}


def test_the_fastest_ways_are_tried_first() -> None:
    config = tiny("qwen3_windowed").config
    for device, function in (("cpu", GROUP_ATTENTION), ("cuda", FLEX)):
        kinds = list(attention_kinds(config, torch.device(device)).values())
        assert [kind.implementation for kind in kinds] == [function] * 3 + ["eager"] * 3
        assert [kind.reach for kind in kinds[:3]] == list(reaches(config).values())
        assert {kind.layout for kind in kinds} == {"packed"} and CONCATENATED_ONLY.layout == "concatenated"


def test_a_type_of_layer_that_is_unknown_has_no_mask_of_its_own() -> None:
    config = tiny("qwen3").config
    config.layer_types = ["linear_attention", "full_attention"]
    assert reaches(config) == {"one mask": Reach()}


def test_plain_sequences_get_a_padding_mask_only() -> None:
    groups = random_groups((2, 1), vocabulary=9)
    batch = pack(groups, positions=range(2), num_candidates=2, pad_id=0, row_tokens=None, layout="concatenated")
    inputs = attention_inputs(batch, CONCATENATED_ONLY, "sdpa", torch.float32)
    assert set(inputs) == {"attention_mask"}
    sums = [len(group.prompt_ids) + len(candidate.ids) for group in groups for candidate in group.candidates]
    assert inputs["attention_mask"].sum(dim=1).tolist() == sums


def test_packed_rows_are_refused_where_the_family_reads_plain_sequences(batch: PackedBatch) -> None:
    with pytest.raises(ValueError, match="layout='concatenated'"):
        attention_inputs(batch, CONCATENATED_ONLY, "sdpa", torch.float32)
