"""What a weight refresh costs: a state of 1 GB from one process into another's model, and what copying it costs here.

    python -m examples.bench.refresh [--quick] [--direct]

The trainer's side is its digest and the copy into shared memory, the engine's side the copy into its own weights.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rayalign.engine.batches import Weights
from rayalign.engine.checkpoint.sending import num_bytes
from rayalign.engine.model.pretrained import state_digest
from rayalign.placement import Share
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import connect
from rayalign.runtime.weights import ObjectStore, make_board

from .common import arguments, machine, spread, table

MATRICES, SIDE = 16, 4096
"""16 float32 matrices of 64 MiB: 1 GiB."""
STEPS = ("copy", "digest", "send", "fetch", "load")
VERSION = Weights(step=0, attempt="bench", digest="0" * 64, directory=None, canary=(), num_bytes=0)


def make_state(matrices: int) -> nn.Module:
    """A model with nothing but weights, written once so that the memory is really there."""
    return nn.ParameterList([torch.full((SIDE, SIDE), float(number)) for number in range(matrices)])


class Trainer:
    """Holds the newest weights and sends them."""

    def __init__(self, given: tuple[int, bool]) -> None:
        matrices, self.direct = given
        self.model = make_state(matrices)
        self.other = {name: torch.empty_like(tensor).zero_() for name, tensor in self.model.state_dict().items()}

    def __call__(self, number: int) -> dict[str, Any]:
        state = self.model.state_dict()
        seconds = {"copy": timed(lambda: copy(state, self.other))}
        seconds["digest"] = timed(lambda: state_digest(state))  # type: ignore[arg-type]
        seconds["send"] = timed(lambda: ObjectStore(direct=self.direct).send(replace(VERSION, step=number), state))
        return seconds | {"bytes": num_bytes(state)}


class Engine:
    """Has weights of its own, which it overwrites."""

    def __init__(self, matrices: int) -> None:
        self.model = make_state(matrices)

    def __call__(self, number: int) -> dict[str, float]:
        found: dict[str, Tensor] = {}
        seconds = {"fetch": timed(lambda: found.update(ObjectStore().fetch(replace(VERSION, step=number)) or {}))}
        return seconds | {"load": timed(lambda: self.model.load_state_dict(found))}


def copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="refreshes; one more before them does not count")
    parser.add_argument("--direct", action="store_true", help="from memory to memory by NIXL, not through the store")
    options = parser.parse_args()
    matrices = 2 if options.quick else MATRICES
    print(machine())
    share = Share(cpus=0.5, gpus=0, threads=options.threads)
    with connect():
        board = make_board()  # noqa: F841  (lives as long as it is held)
        with (
            Pool("trainer", Trainer, (matrices, options.direct), share=share, most=1) as trainer,
            Pool("engine", Engine, matrices, share=share, most=1) as engine,
        ):
            runs = [trainer.call(number) | engine.call(number) for number in range(options.repeats + 1)][1:]
    size = runs[0]["bytes"]
    total = [sum(run[step] for step in STEPS[1:]) for run in runs]
    rows = [[step, spread([1000 * run[step] for run in runs], 0)] for step in STEPS]
    rows.append(["refresh (digest, send, fetch, load)", spread([1000 * value for value in total], 0)])
    print(f"{size / 1e9:.2f} GB, {options.threads} threads, {options.repeats} refreshes, medians and ranges")
    print(table(("", "ms"), rows))
    print(f"copy: {spread([size / run['copy'] / 1e9 for run in runs], 2)} GB/s")
    print(f"refresh: {spread([size / value / 1e9 for value in total], 2)} GB/s")
    moved = [(run["send"] + run["fetch"] + run["load"]) / (2 * run["copy"]) for run in runs]
    print(f"send, fetch and load : the two copies that they require, turn by turn: {spread(moved, 2)} ×")


if __name__ == "__main__":
    main()
