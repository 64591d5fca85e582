"""Weights on their way: nothing is lost, nothing is sent twice, and the receiver's own memory is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import weights_digest
from tiny_runs import save_tiny

from rayalign.config.model import ModelConfig
from rayalign.engine.canary import canary_error, canary_logps
from rayalign.engine.checkpoint.sending import num_bytes
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec, load_policy
from rayalign.rollout.engines import HfSampler
from rayalign.runtime.weights import VersionBoard, flat_entries, tensors_of_entries

ODD = {
    "matrix": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 4),
}


def read_only(entries):
    """As they come out of shared memory."""
    for content, _, _ in entries.values():
        if isinstance(content, np.ndarray):
            content.setflags(write=False)
    return entries


def test_every_tensor_arrives_as_it_was() -> None:
    found = tensors_of_entries(read_only(flat_entries(ODD)))
    assert list(found) == list(ODD)
    for name, tensor in ODD.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_tied_weights_are_sent_once() -> None:
    shared = torch.arange(4.0)
    entries = flat_entries({"embedding": shared, "head": shared, "other": shared.clone()})
    assert entries["head"] == ("embedding", None, ())
    assert num_bytes({"embedding": shared, "head": shared, "other": shared.clone()}) == 2 * 16
    found = tensors_of_entries(entries)
    assert found["head"].data_ptr() == found["embedding"].data_ptr() != found["other"].data_ptr()


def test_the_board_forgets_what_its_sender_replaced() -> None:
    board = VersionBoard()
    board.put("a", "a0", ["ref a0"], 1)
    board.put("b", "b0", ["ref b0"], 2)
    board.put("b", "b1", ["ref b1"], 2)
    board.put("a", "a1", ["ref a1"], 1)
    assert [board.get(version) for version in ("a0", "a1", "b0", "b1")] == [None, ["ref a1"], ["ref b0"], ["ref b1"]]
    board.put("b", "b2", ["ref b2"], 2)
    assert board.get("b0") is None and board.get("b2") == ["ref b2"]


@pytest.fixture(params=["llama", "llama_tied"])
def first(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield save_tiny(tmp_path / request.param, request.param)


def test_an_engine_takes_weights_in_place(first: Path) -> None:
    spec = ScoringSpec(model=ModelSpec(config=ModelConfig(name=str(first))), tokens_per_micro_batch=512, row_tokens=128)
    sampler = HfSampler(spec, torch.device("cpu"))
    sampler.load(spec.model)
    model, _ = load_policy(spec.model)
    for parameter in model.parameters():
        parameter.data += 0.1
    held = sampler.policy.policy.model
    sampler.load(spec.model, tensors_of_entries(read_only(flat_entries(model.state_dict()))))
    assert sampler.policy.policy.model is held
    assert weights_digest(held) == weights_digest(model)
    assert canary_error(canary_logps(model, layout="packed", dtype=torch.float32), sampler.canary()) == 0
    with torch.no_grad():
        next(held.parameters()).zero_()  # its own memory, not the sender's
    assert weights_digest(held) != weights_digest(model)


def test_a_part_of_the_weights_is_refused(first: Path) -> None:
    spec = ScoringSpec(model=ModelSpec(config=ModelConfig(name=str(first))), tokens_per_micro_batch=512, row_tokens=128)
    sampler = HfSampler(spec, torch.device("cpu"))
    sampler.load(spec.model)
    state = dict(sampler.policy.policy.model.state_dict())
    del state["model.layers.0.self_attn.v_proj.weight"]
    with pytest.raises(RuntimeError, match="v_proj"):
        sampler.load(spec.model, state)
