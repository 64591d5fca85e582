"""Does it matter that only some shards are shuffled together? Final losses of DPO on the support desk, by window.

    python -m examples.bench.shuffle [--quick]

The rows lie in the worst order: sorted by their prompts, so that the rows of a shard are alike. A model is trained for
one epoch from each seed with rows drawn from 1, 4 or 16 shards at a time, or from all. The loss is that of held-out
pairs. The spread of places says how far a shard's rows are scattered over the epoch: 0.289 is that of a full shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from examples.lab.world import pairs as lab_pairs
from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.pack import pack
from rayalign.data.records import RawRow
from rayalign.data.stream import Stream, WindowedOrder
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.pretrained import ModelSpec, load_policy
from rayalign.methods import dpo_loss
from rayalign.types import PackedBatch

from .common import arguments, machine, table

MODEL = Path(__file__).parents[1] / "lab" / "model"
SHARDS = 64
HELD_OUT = 256
GROUPS_PER_STEP = 16
WINDOWS = (1, 4, 16, SHARDS)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seeds = 256, 2
    print(machine())
    trained, held_out = groups_of(0, options.rows), groups_of(10_000, HELD_OUT)
    trained.sort(key=lambda group: group.prompt_ids.tolist())
    parts = [len(part) for part in np.array_split(np.arange(len(trained)), SHARDS)]
    found = []
    for window in WINDOWS:
        losses = [final_loss(trained, held_out, parts, window, seed) for seed in range(options.seeds)]
        spread = scattering(parts, window)
        found.append([str(window), f"{mean(losses):.4f}", f"{stdev(losses):.4f}", f"{spread:.3f}"])
    print(f"{options.rows} pairs in {SHARDS} shards, one epoch, {options.seeds} seeds")
    print(table(("shards together", "held-out loss", "sd over seeds", "spread of places"), found))


def groups_of(first: int, count: int) -> list[Group]:
    """Pairs of the support desk, which the untrained model's log-probs lie beside."""
    chat = make_chat(load_policy(ModelSpec(config=ModelConfig(name=str(MODEL), from_scratch=True), seed=0))[1])
    rows = [RawRow(source="lab", line=line, value=row) for line, row in enumerate(lab_pairs(first, count), start=1)]
    outcomes = rows_to_groups(rows, chat, TokenBudget(max_prompt_tokens=128, max_tokens=256))
    return [outcome.group for outcome in outcomes if isinstance(outcome, Tokenized)]


def final_loss(
    trained: Sequence[Group], held_out: Sequence[Group], parts: Sequence[int], window: int, seed: int
) -> float:
    """Held-out loss of a model that began with the weights of ``seed``, nats."""
    policy = Policy(load_policy(ModelSpec(config=ModelConfig(name=str(MODEL), from_scratch=True), seed=seed))[0])
    scored = [group for first in range(0, len(trained), 32) for group in with_reference(policy, trained[first:][:32])]
    checked = [group for first in range(0, HELD_OUT, 32) for group in with_reference(policy, held_out[first:][:32])]
    stream = Stream(
        name="train",
        sizes=(len(scored),),
        weights=(1.0,),
        groups_per_step=GROUPS_PER_STEP,
        seed=seed,
        orders=(WindowedOrder(seed, "train/0", parts, window),),
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, weight_decay=0.0)

    def loss_of(groups: Sequence[Group]) -> torch.Tensor:
        batch = pack_pairs(groups)
        return dpo_loss(policy(batch).logp, batch.per_candidate["ref_logp"], beta=0.1).mean()

    for step in range(stream.num_steps(1)):
        optimizer.zero_grad()
        loss_of([scored[stream.row(position)[1]] for position in stream.positions(step)]).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return mean(loss_of(checked[first:][:32]).item() for first in range(0, len(checked), 32))


def pack_pairs(groups: Sequence[Group]) -> PackedBatch:
    return pack(groups, positions=range(len(groups)), num_candidates=2, pad_id=0, row_tokens=512)


@torch.no_grad()
def with_reference(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    lengths = [sum(candidate.num_predicted for candidate in group.candidates) for group in groups]
    columns = policy(pack_pairs(groups)).token_logp.split(lengths)
    return [
        replace(group, per_token={"ref_token_logp": column.numpy()})
        for group, column in zip(groups, columns, strict=True)
    ]


def scattering(parts: Sequence[int], window: int) -> float:
    """Standard deviation of the places of a shard's rows in the epoch, as shares of it; mean over shards."""
    total = sum(parts)
    ordered = WindowedOrder(0, "train/0", parts, window)
    rows = np.array([ordered(0, index) for index in range(total)])
    shard_of = np.repeat(np.arange(len(parts)), parts)[rows]
    return float(np.mean([np.std(np.flatnonzero(shard_of == shard) / total) for shard in range(len(parts))]))


if __name__ == "__main__":
    main()
