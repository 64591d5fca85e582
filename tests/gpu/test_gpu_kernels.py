"""Masks, precisions and ways of the backward pass on a device, against transformers' plain sequences on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from causal_zoo import animal
from random_groups import random_groups
from tiny_models import VOCABULARY, WINDOW, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.batches import to_device
from rayalign.engine.model.attention import FLEX
from rayalign.engine.model.checkpointing import checkpoint_blocks
from rayalign.engine.model.compiled import compile_blocks
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.head import HeadForm, token_logprobs
from rayalign.engine.model.parity import TOLERANCE, choose_attention, measure_attention
from rayalign.types import PackedBatch

FAMILIES = ("llama", "llama_tied", "qwen3", "gpt2", "gemma", "phi", "granite")
WINDOWED = ("qwen2_windowed", "mistral_windowed", "gemma2", "gemma3")
OTHERS = ("gpt_oss", "deepseek_v3", "llama4_text", "qwen3_moe", "cohere2")
GROUPS = random_groups((1, 2, 4, 2), vocabulary=VOCABULARY, prompt_tokens=(WINDOW - 1, 2 * WINDOW))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))


def batch_on(device: torch.device, layout: Layout = "packed") -> PackedBatch:
    made = pack(GROUPS, positions=range(len(GROUPS)), num_candidates=4, pad_id=0, row_tokens=None, layout=layout)
    return to_device(made, device)


def policy_on(device: torch.device, name: str) -> Policy:
    model = tiny(name).to(device)
    return Policy(model, attention=choose_attention(model, device=device))


def weighted(token_logp: Tensor) -> Tensor:
    weights = torch.randn(len(token_logp), generator=torch.Generator().manual_seed(3))
    return token_logp @ weights.to(token_logp.device)


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    value.backward()
    return {name: own.grad.clone() for name, own in module.named_parameters() if own.grad is not None}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, within: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= within * gradient.norm() + 1e-5, name


def assert_packed(model: PreTrainedModel, device: torch.device) -> None:
    model = model.to(device)
    model.set_attn_implementation("eager")
    found = measure_attention(model, device=device)
    best = next(name for name, difference in found.items() if difference <= TOLERANCE)
    assert "one mask" in best or "a mask per type" in best, found
    if device.type == "cuda":
        assert best.startswith(FLEX), found


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED])
def test_packed_rows_are_plain_sequences(device: torch.device, name: str) -> None:
    """Values and the embedding's gradient, for groups of 1, 2 and 4 candidates longer than the windows."""
    assert_packed(tiny(name), device)


@pytest.mark.parametrize("model_type", OTHERS)
def test_packed_rows_of_experts_latents_sinks_and_chunks(device: torch.device, model_type: str) -> None:
    assert_packed(animal(model_type), device)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral_windowed"])
def test_packed_and_concatenated_rows_have_one_gradient(device: torch.device, name: str) -> None:
    policy = policy_on(device, name)
    packed = gradients(policy, weighted(policy(batch_on(device)).token_logp))
    concatenated = gradients(policy, weighted(policy(batch_on(device, "concatenated")).token_logp))
    assert_same(packed, concatenated, within=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2"])
def test_bfloat16_stays_close_to_float32(device: torch.device, name: str) -> None:
    policy, batch = policy_on(device, name), batch_on(device)
    with torch.no_grad():
        exact = policy(batch).token_logp
        with torch.autocast(device.type, dtype=torch.bfloat16):
            low = policy(batch).token_logp
    assert low.dtype == torch.float32
    difference = (low - exact).abs()
    assert difference.mean() < 0.05 and difference.max() < 0.5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("how", [True, "selective"])
def test_checkpointing_changes_no_gradient(device: torch.device, how: Literal[True, "selective"], name: str) -> None:
    policy, batch = policy_on(device, name), batch_on(device)
    policy.train()
    expected = gradients(policy, weighted(policy(batch).token_logp))
    checkpoint_blocks(policy.model, how)
    policy.train()
    assert_same(gradients(policy, weighted(policy(batch).token_logp)), expected, within=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiled_blocks_change_rounding_alone(device: torch.device, name: str) -> None:
    policy, batch = policy_on(device, name), batch_on(device)
    expected = gradients(policy, weighted(policy(batch).token_logp))
    compile_blocks(policy.model, device)
    assert_same(gradients(policy, weighted(policy(batch).token_logp)), expected, within=1e-3)


@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_head_in_chunks_is_the_softmax(device: torch.device, chunk_bytes: int | None, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=draw).to(device) for size in ((65, 32), (401, 32)))
    target = torch.randint(0, 401, (65,), generator=draw).to(device)
    hidden.requires_grad_()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        found = token_logprobs(hidden, weight, target, form=HeadForm(chunk_bytes=chunk_bytes))["token_logp"]
    wide = hidden.detach().double().requires_grad_()
    expected = (wide @ weight.double().T).log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    bound = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=0)
    weighted(found).backward()
    weighted(expected.float()).backward()
    assert hidden.grad is not None and wide.grad is not None
    assert (hidden.grad - wide.grad).norm() <= bound * wide.grad.norm()
