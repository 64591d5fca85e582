"""The memory that is planned against what autograd really keeps, and against what a process really uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.config.model import LoraConfig
from rayalign.engine.memory import activation_bytes
from rayalign.engine.model.lora import add_adapter
from rayalign.errors import UserError

TOKENS = 96


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def really_kept(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of what autograd saves in a real forward, each storage once, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.arange(TOKENS)[None] % 50
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
    ):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma"])
def test_activations_are_what_autograd_keeps(family: str, dtype: torch.dtype) -> None:
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    found = activation_bytes(skeleton_of(model), tokens=TOKENS, dtype=dtype)
    assert found.kept(checkpointed=False) + found.casts == pytest.approx(really_kept(model, dtype), rel=0.08)


def test_an_adapter_keeps_less_of_frozen_layers() -> None:
    model, plain = tiny("llama_tied"), skeleton_of(tiny("llama_tied"))
    add_adapter(model, LoraConfig(rank=4), seed=0)
    skeleton = skeleton_of(tiny("llama_tied"))
    add_adapter(skeleton, LoraConfig(rank=4), seed=0)
    found = activation_bytes(skeleton, tokens=TOKENS, dtype=torch.float32)
    assert found.kept(checkpointed=False) == pytest.approx(really_kept(model, torch.float32), rel=0.08)
    assert found != activation_bytes(plain, tokens=TOKENS, dtype=torch.float32)


def test_activations_grow_with_tokens_and_blocks() -> None:
    skeleton = skeleton_of(tiny("llama_tied"))
    one, two = (activation_bytes(skeleton, tokens=tokens, dtype=torch.float32) for tokens in (64, 128))
    assert len(one.blocks) == skeleton.config.num_hidden_layers
    assert [2 * size for size in one.blocks] == pytest.approx(list(two.blocks), rel=0.02)
    assert one.inputs == len(one.blocks) * 64 * skeleton.config.hidden_size * 4
    assert one.kept(checkpointed=True) == one.inputs + max(one.blocks) + one.outside
    assert skeleton.config._attn_implementation != "rayalign_shapes"


def test_a_family_that_looks_at_values_is_refused() -> None:
    from causal_zoo import animal

    with pytest.raises(UserError, match="dbrx: the memory of its activations cannot be told from shapes"):
        activation_bytes(skeleton_of(animal("dbrx")), tokens=64, dtype=torch.float32)


MEASURED = Path(__file__).parents[2] / "fixtures" / "measured_memory.py"
CASES = {
    "float32": {"dtype": "float32", "checkpointed": False, "tokens": 4096},
    "bfloat16": {"dtype": "bfloat16", "checkpointed": False, "tokens": 4096},
    "checkpointed": {"dtype": "float32", "checkpointed": True, "tokens": 8192},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_process_uses_what_is_planned(case: str) -> None:
    """The allocator gives memory back at once, as a device's does; else glibc's fragments are measured."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(MEASURED), json.dumps(CASES[case])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)
