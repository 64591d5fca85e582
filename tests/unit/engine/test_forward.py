"""Packed rows, plain rows and transformers' own forward say the same of every token, with the same gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from attention_kinds import kind_for
from random_groups import random_groups
from tiny_models import FAMILIES, VOCABULARY, WINDOW, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rayalign.data.group import Group
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.model.attention import AttentionKind, Reach
from rayalign.engine.model.checkpointing import checkpoint_blocks
from rayalign.engine.model.forward import Policy
from rayalign.errors import UserError
from rayalign.types import PackedBatch

K = 4
GROUPS = random_groups((1, 2, 4, 2), vocabulary=VOCABULARY, prompt_tokens=(WINDOW - 1, 2 * WINDOW))
PACKABLE = [name for name in FAMILIES if name not in {"bloom", "mamba"}]
WINDOWED = [name for name in PACKABLE if "window" in name or name in {"gemma2", "gemma3", "llama4", "olmo3", "phi3"}]


def packed(
    groups: Sequence[Group] = GROUPS, *, layout: Layout = "packed", row_tokens: int | None = 64, dummy: bool = False
) -> PackedBatch:
    return pack(
        groups,
        positions=range(len(groups)),
        num_candidates=K,
        pad_id=0,
        row_tokens=row_tokens,
        layout=layout,
        dummy=dummy,
    )


def family(name: str) -> PreTrainedModel:
    model = tiny(name)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def plain_token_logp(model: PreTrainedModel, groups: Sequence[Group] = GROUPS) -> Tensor:
    """Each prompt with each candidate alone, through the whole Hugging Face model."""
    columns = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.tensor([*group.prompt_ids, *candidate.ids])
            logp = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
            first = len(group.prompt_ids)
            columns += [logp[t - 1, ids[t]] for t in range(first, len(ids)) if candidate.mask[t - first]]
    return torch.stack(columns)


def weighted(token_logp: Tensor) -> Tensor:
    return token_logp @ torch.randn(len(token_logp), generator=torch.Generator().manual_seed(3))


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_agrees_with_hugging_face(name: str) -> None:
    model = family(name)
    expected = plain_token_logp(model)
    expected_gradients = gradients(model, weighted(expected))
    layouts: list[tuple[Layout, int | None]] = [("concatenated", None)]
    if name in PACKABLE:
        layouts += [("packed", 64), ("packed", None)]
    for layout, row_tokens in layouts:
        scores = Policy(model, attention=kind_for(model, layout))(packed(layout=layout, row_tokens=row_tokens))
        torch.testing.assert_close(scores.token_logp, expected, atol=1e-4, rtol=0)
        assert_same_gradients(gradients(model, weighted(scores.token_logp)), expected_gradients)


@pytest.mark.parametrize("name", PACKABLE)
def test_a_packing_policy_reads_concatenated_rows_too(name: str) -> None:
    model = family(name)
    with torch.no_grad():
        scores = Policy(model)(packed(layout="concatenated"))
        torch.testing.assert_close(scores.token_logp, plain_token_logp(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_mask_without_the_window_is_wrong_beyond_it(name: str) -> None:
    policy = Policy(family(name))
    reach = policy.attention.reach
    policy.attention = AttentionKind(reach=dict.fromkeys(reach, Reach()) if isinstance(reach, Mapping) else Reach())
    with torch.no_grad():
        difference = policy(packed()).token_logp - plain_token_logp(policy.model)
    assert difference.abs().max() > 0.5


@torch.no_grad()
def test_sums_and_lengths_of_candidates() -> None:
    groups = [
        replace(
            group, candidates=tuple(replace(c, mask=c.mask & (c.ids % 3 > 0) | (c.ids < 6)) for c in group.candidates)
        )
        for group in random_groups((1, 4, 2), vocabulary=VOCABULARY, candidate_tokens=(6, 9))
    ]
    model = tiny("llama")
    scores = Policy(model)(packed(groups))
    token_logp = plain_token_logp(model, groups)
    start = 0
    for b, group in enumerate(groups):
        for k in range(K):
            length = group.candidates[k].num_predicted if k < len(group.candidates) else 0
            assert scores.length[b, k] == length
            torch.testing.assert_close(scores.logp[b, k], token_logp[start : start + length].sum(), atol=1e-4, rtol=0)
            start += length
    assert start == len(token_logp)


@torch.no_grad()
def test_statistics_and_temperature_reach_the_head() -> None:
    model = tiny("llama")
    policy = Policy(model, chunk_bytes=7 * 4 * VOCABULARY)
    batch = packed()
    plain = policy(batch)
    assert plain.log_sum_p2 is None and plain.log_max_p is None and plain.entropy is None
    scores = policy(batch, needs=frozenset({"log_max_p", "plain_token_logp"}), logit_temperature=2.0)
    torch.testing.assert_close(scores.plain_token_logp, plain.token_logp)
    assert scores.log_sum_p2 is None
    assert (scores.log_max_p >= plain.token_logp).all()
    head = model.get_output_embeddings()
    head.weight.div_(2.0)
    torch.testing.assert_close(policy(batch).token_logp, scores.token_logp)


def test_a_dummy_batch_gives_every_parameter_a_zero_gradient() -> None:
    model = tiny("llama")
    scores = Policy(model)(packed(GROUPS[:1], dummy=True))
    got = gradients(model, scores.logp.sum() * 0)
    assert got.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in got.values())


@pytest.mark.parametrize("name", ["gemma3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("how", [True, "selective"])
def test_gradient_checkpointing_changes_nothing(how: Literal[True, "selective"], name: str) -> None:
    model = tiny(name).train()
    expected = gradients(model, weighted(Policy(model)(packed()).token_logp))
    checkpoint_blocks(model, how)
    assert_same_gradients(gradients(model, weighted(Policy(model)(packed()).token_logp)), expected)


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_again() -> None:
    """Products and attention as often as without, activation functions as often as with whole blocks."""
    times = {}
    for how in (False, "selective", True):
        model = tiny("llama").train()
        if how:
            checkpoint_blocks(model, how)
        with Counted() as counted:
            weighted(Policy(model)(packed()).token_logp).backward()
        times[how] = counted.times
    for name in ("mm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert times[False][name] == times["selective"][name] < times[True][name]
    assert times[False]["silu"] < times["selective"]["silu"] == times[True]["silu"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_autocast_stays_close(name: str) -> None:
    model = family(name)
    policy = Policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = policy(packed())
    assert scores.token_logp.dtype == scores.logp.dtype == torch.float32
    difference = (scores.token_logp - policy(packed()).token_logp).abs()
    assert difference.mean() < 0.05
    assert all(gradient.isfinite().all() for gradient in gradients(model, scores.logp.sum()).values())


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = tiny("llama")
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(UserError, match="llama models have no linear LM head"):
        Policy(model)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_wrapped_policies_have_the_same_gradient(process_group: None, wrapping: str, name: str) -> None:
    policy = Policy(tiny(name))
    expected = gradients(policy, weighted(policy(packed()).token_logp))
    if wrapping == "ddp":
        module: nn.Module = DistributedDataParallel(policy)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in policy.model.model.layers:
            fully_shard(layer, mesh=mesh)
        module = fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    policy.zero_grad()
    weighted(module(packed()).token_logp).backward()
    whole = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in policy.named_parameters()}
    assert_same_gradients(whole, expected)
