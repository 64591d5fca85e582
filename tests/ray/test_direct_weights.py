"""Weights that go from memory to memory by NIXL: the same bits, of the step that sent them."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any

import pytest
import ray
import torch
from workspaces import Workspace, metrics, rayalign, weights

from rayalign.engine.batches import Weights
from rayalign.rounds.weights import WeightsGone
from rayalign.runtime.session import Session
from rayalign.runtime.weights import ObjectStore, make_board

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed: make test-slow installs it"),
]

WEIGHTS = Weights(step=3, attempt="a", digest="0" * 64, directory=None, canary=(), num_bytes=0)
REWARDS = """
def vowels(prompt, reply):
    return sum(character in "aeiou" for character in reply) / max(1, len(reply))
"""


def odd_state() -> dict[str, torch.Tensor]:
    tied = torch.arange(12.0).reshape(3, 4)
    return {
        "matrix": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "embedding": tied,
        "head": tied,
    }


class Sender:
    def __init__(self) -> None:
        self.state = odd_state()

    def send(self) -> None:
        """What training does next does not reach the version that was sent."""
        ObjectStore(direct=True).send(WEIGHTS, self.state)
        for tensor in self.state.values():
            tensor.zero_()


class Receiver:
    def fetch(self) -> Any:
        try:
            found = ObjectStore().fetch(WEIGHTS)
        except WeightsGone as error:
            return str(error)
        assert found is not None
        return found, found["head"].data_ptr() == found["embedding"].data_ptr()


def is_what_was_sent(answer: Any) -> None:
    found, tied = answer
    assert tied and list(found) == list(odd_state())
    for name, tensor in odd_state().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_version_is_what_was_sent_until_its_sender_ends(session: Session) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import a test
    board = make_board()  # lives as long as it is held
    sender, receiver = ray.remote(num_cpus=0)(Sender).remote(), ray.remote(num_cpus=0)(Receiver).remote()
    ray.get(sender.send.remote())
    for _ in range(2):
        is_what_was_sent(ray.get(receiver.fetch.remote(), timeout=120))
    ray.kill(sender)
    until = time.monotonic() + 60
    while not isinstance(answer := ray.get(receiver.fetch.remote(), timeout=120), str):
        is_what_was_sent(answer)  # the receiver's node has not heard of the death
        assert time.monotonic() < until
    assert "ended with the training process" in answer
    del board


def test_a_run_trains_the_same_weights(workspace: Workspace, session: Session) -> None:
    (workspace.folder / "rewards.py").write_text(REWARDS)
    for name in ("object_store", "nixl"):
        path = workspace.run(
            name,
            data_policy={"name": "on_policy", "refresh_every": 2},
            rollout={"engine": "hf", "samples": 2, "max_new_tokens": 12, "transfer": name},
            scorer={"name": "rule", "function": "rewards:vowels"},
            optim={"lr": 1e-3, "steps": 4, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        )
        done = rayalign("train", path)
        assert done.code == 0, done.printed
        assert metrics(workspace.directory(name))[2]["refresh/bytes"] > 0
    through, past = workspace.directory("object_store"), workspace.directory("nixl")
    assert weights(through) == weights(past)
    assert [row["loss"] for row in metrics(through)] == [row["loss"] for row in metrics(past)]
