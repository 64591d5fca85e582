"""What a step that is not finite leaves: its groups in files, so that somebody can look at them.

Every worker writes its part into ``nonfinite/step_000006/rank_0.json`` of the run's folder: names, token ids, columns.
Where the method's terms belong to single groups, the loss of every group is there too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rayalign.engine.batches import StreamWork
from rayalign.engine.state import Run
from rayalign.engine.step import NonFiniteStep, Runner, StepResult
from rayalign.methods.method import Term
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import Place
from rayalign.types import PackedBatch, Scored

log = logging.getLogger(__name__)

FOLDER = "nonfinite"
NAMED_GROUPS = 8
"""How many groups an error names before it says how many more there are."""


def skip_step(run: Run, work: Sequence[StreamWork], error: NonFiniteStep) -> StepResult:
    """Skip a step that is not finite; raises ``error`` with its groups where the run is to stop instead."""
    run.skipped_steps += 1
    run.skipped_in_a_row += 1
    before, most = run.skipped_in_a_row - 1, run.spec.optim.max_skipped_in_a_row
    if run.spec.optim.on_nonfinite == "stop" or before == most:
        enough = f", after {most} that were skipped, which optim.max_skipped_in_a_row allows" if before else ""
        last = NonFiniteStep(f"{error}{enough}", loss=error.loss, grad_norm=error.grad_norm, suspects=error.suspects)
        raise with_groups(last, run.runner, work, step=run.step, directory=run.spec.directory) from error
    log.warning("%s: skipped; %s on worker %d", error, name_suspects(error.suspects), run.strategy.rank)
    return StepResult(loss=error.loss, grad_norm=error.grad_norm, metrics={}, stop=error.stop, ask=error.ask)


def with_groups(
    error: NonFiniteStep, runner: Runner, work: Sequence[StreamWork], *, step: int, directory: Place
) -> NonFiniteStep:
    """``error`` with what there is to know, its groups on the disk. Every worker calls this, and all say the same."""
    strategy, folder = runner.strategy, directory / FOLDER / f"step_{step + 1:06d}"
    groups = describe_groups(runner, work, step)
    broken = [group["group"] for group in groups if str in map(type, group["losses"].values())]
    facts = {
        "step": step + 1,
        "loss": json_loss(error.loss),
        "grad_norm": json_loss(error.grad_norm),
        "suspects": broken or list(error.suspects),
        "groups": groups,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / f"rank_{strategy.rank}.json", json.dumps(facts) + "\n")
    strategy.all_sum(torch.zeros(1, device=strategy.device))  # all files are there
    parts = [json.loads((folder / f"rank_{rank}.json").read_text("utf-8")) for rank in range(strategy.world_size)]
    suspects = list(chain.from_iterable(part["suspects"] for part in parts))
    return NonFiniteStep(
        f"{error}; {name_suspects(suspects)}. Nothing of this step is kept. Its groups, with token ids and losses, are "
        f"in {folder}. Look at these data, write optim.on_nonfinite: skip to continue without such steps, or start a "
        "run of another name with a lower optim.lr",
        loss=error.loss,
        grad_norm=error.grad_norm,
        suspects=suspects,
    )


def name_suspects(suspects: Sequence[str]) -> str:
    """Which groups have a loss that is not finite, in a few words."""
    more = f" and {len(suspects) - NAMED_GROUPS} more" if len(suspects) > NAMED_GROUPS else ""
    return (
        f"the loss is not finite on {', '.join(suspects[:NAMED_GROUPS])}{more}" if suspects else "every loss is finite"
    )


@torch.no_grad()
def describe_groups(runner: Runner, work: Sequence[StreamWork], step: int) -> list[dict[str, Any]]:
    """This worker's groups, each with its losses; one more forward of every micro-batch, on all workers alike."""
    found = []
    for part in work:
        objective = runner.objectives[part.stream]
        statistics = runner.statistics(step, part)
        for batch in part.micro_batches:
            scored = runner.score(objective, batch)
            terms = objective.method.loss(scored, objective.config, statistics)
            for group in range(len(batch.group_index)):
                if not batch.candidate_mask[group].any():
                    continue  # a dummy is another micro-batch's
                losses = {term.name: loss_of(term, scored, group) for term in terms}
                found.append(
                    {
                        "stream": part.stream,
                        "group": part.describe(int(batch.group_index[group])),
                        **group_contents(batch, group),
                        "losses": {name: json_loss(loss) for name, loss in losses.items() if loss is not None},
                    }
                )
    return found


def group_contents(batch: PackedBatch, group: int) -> dict[str, Any]:
    """Token ids of a group's prompt and candidates, and its columns [K]."""
    own = batch.group_ids == group
    row = int(own.any(dim=1).nonzero()[0])  # every row that has one of its candidates has the prompt
    columns = {name: list(map(json_loss, column[group].tolist())) for name, column in batch.per_candidate.items()}
    return {
        "prompt_ids": batch.input_ids[row][own[row] & (batch.branch_ids[row] == 0)].tolist(),
        "candidates": [
            batch.input_ids[own & (batch.branch_ids == k + 1)].tolist()
            for k in range(batch.candidate_mask.shape[1])
            if batch.candidate_mask[group, k]
        ],
        "columns": columns,
    }


def loss_of(term: Term, scored: Scored, group: int) -> float | None:
    """A term's sum over one group's items; None where the items are not one per group, candidate or token."""
    batch = scored.batch
    num_groups, num_candidates = batch.candidate_mask.shape
    owners = {
        "pairs": torch.arange(num_groups),
        "groups": torch.arange(num_groups),
        "sequences": torch.arange(num_groups * num_candidates) // num_candidates,
        "tokens": batch.candidate_of // num_candidates,
    }
    owner: Tensor = owners.get(term.over, owners["groups"])
    if len(owner) != term.per_item.numel():
        return None
    own = (owner.to(term.mask.device) == group) & term.mask.reshape(-1)
    return float(term.weight * term.per_item.reshape(-1)[own].double().sum())


def json_loss(value: float) -> float | str:
    """A number for JSON, which has no NaN and no infinity: those are words."""
    return value if math.isfinite(value) else str(value)
