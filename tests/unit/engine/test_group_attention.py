"""Attention group by group: the rule of the dense mask, and transformers' own numbers in every family that packs."""

from __future__ import annotations

import pytest
import torch
from attention_kinds import kind_for
from random_groups import random_groups
from tiny_models import FAMILIES, VOCABULARY, WINDOW, tiny
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.model.attention import Reach, additive_mask
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.group_attention import GROUP_ATTENTION, branch_runs, visible_tokens
from rayalign.types import PackedBatch

GROUPS = random_groups((1, 2, 4, 2), vocabulary=VOCABULARY, prompt_tokens=(WINDOW - 1, 2 * WINDOW))
PACKABLE = [name for name in FAMILIES if name not in ("bloom", "mamba")]


def packed(row_tokens: int | None, layout: Layout = "packed") -> PackedBatch:
    return pack(GROUPS, positions=range(len(GROUPS)), num_candidates=4, pad_id=0, row_tokens=row_tokens, layout=layout)


@pytest.mark.parametrize("reach", [Reach(), Reach(window=3), Reach(chunk=4), Reach(window=3, chunk=4)], ids=str)
@pytest.mark.parametrize("row_tokens", [None, 40])
def test_the_rule_is_that_of_the_dense_mask(reach: Reach, row_tokens: int | None) -> None:
    batch = packed(row_tokens)
    allowed = additive_mask(batch, reach, torch.float32)[:, 0] == 0
    (window, chunk), *runs = branch_runs(batch, window=reach.window, chunk=reach.chunk)[0, 0].tolist()
    assert (window, chunk) == (reach.window or 0, reach.chunk or 0)
    assert sum(size for size, _ in runs) == batch.input_ids.numel()
    found = torch.zeros_like(allowed)
    length = batch.input_ids.shape[1]
    at = 0
    while runs:
        size, branch = runs.pop(0)
        row, column = divmod(at, length)
        if branch == -1:
            assert (batch.group_ids[row, column : column + size] == -1).all()
            padding = allowed[row, column : column + size]
            found[row, column : column + size] = padding  # what padding sees is of no consequence
            at += size
            continue
        assert branch == 0
        sizes = [size]
        while runs and runs[0][1] > 0:
            sizes.append(runs.pop(0)[0])
        block = slice(column, column + sum(sizes))
        found[row, block, block] = visible_tokens(sizes, window=window, chunk=chunk)
        at += sum(sizes)
    assert torch.equal(found, allowed)


def token_logp_and_gradients(model: PreTrainedModel, batch: PackedBatch, layout: Layout) -> list[Tensor]:
    token_logp = Policy(model, attention=kind_for(model, layout))(batch).token_logp
    coefficient = torch.randn(len(token_logp), generator=torch.Generator().manual_seed(3))
    return [token_logp, *torch.autograd.grad(token_logp @ coefficient, list(model.parameters()))]


@pytest.mark.parametrize("name", PACKABLE)
def test_values_and_gradients_are_those_of_plain_rows(name: str) -> None:
    # Rows of one plain sequence need no mask of ours: transformers makes its own.
    model = tiny(name)
    model.set_attn_implementation("eager")
    plain = token_logp_and_gradients(model, packed(None, "concatenated"), "concatenated")
    for row_tokens in (None, 40):
        grouped = token_logp_and_gradients(model, packed(row_tokens), "packed")
        torch.testing.assert_close(grouped[0], plain[0], atol=1e-5, rtol=0)
        for got, want in zip(grouped[1:], plain[1:], strict=True):
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3_windowed"])
@torch.no_grad()
def test_other_masks_are_left_to_sdpa(name: str) -> None:
    expected, model = tiny(name), tiny(name)
    model.set_attn_implementation(GROUP_ATTENTION)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # as in generation, shorter prompts are padded on the left
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        torch.testing.assert_close(model(**inputs).logits[:, 4:], expected(**inputs).logits[:, 4:])
    generate = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**generate), expected.generate(**generate))


@torch.no_grad()
def test_bfloat16_autocast() -> None:
    model = tiny("llama")
    expected = Policy(model)(packed(None)).token_logp
    model.set_attn_implementation(GROUP_ATTENTION)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = Policy(model)(packed(40))
    assert (scores.token_logp - expected).abs().mean() < 0.05
