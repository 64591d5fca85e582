"""The steps of a method with a critic: a second model, which values every token, learns beside the policy.

The critic lives in the training workers and reads the micro-batches that the policy reads. When a round is opened, and
before the first step on it, the critic values all its tokens. The method prepares the round with these values. They are
committed with it, so that every worker and every restart trains on the same numbers. A new attempt that
opens a round again values it again: the version of the values names the step and the attempt.

Policy and critic have an optimizer each, and their gradients are clipped apart; the strategy spreads both over the
workers. A checkpoint of the policy holds the critic in ``critic/``; at the end it lies in ``final_critic/``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayalign.engine.batches import Batches, Rounds, RoundWork, StreamWork
from rayalign.engine.checkpoint.checkpoint import Checkpoint
from rayalign.engine.checkpoint.saving import SharedWrite, Writer, checkpoint_is_due, refuse_stopped, save_checkpoint
from rayalign.engine.checkpoint.sending import copy_to_host, num_bytes, offer_weights
from rayalign.engine.loop import (
    attention_of,
    begin_training,
    common_layout,
    export_final,
    load_optimizer,
    train_one_step,
    wait_for_groups,
)
from rayalign.engine.metrics import flush, open_sinks
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.pretrained import save_pretrained
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.optimizer import learning_rate, set_learning_rate
from rayalign.engine.state import CriticSpec, MakeBatches, Notices, Run, TrainSpec
from rayalign.engine.step import Runner, StepResult
from rayalign.engine.strategy.base import Strategy
from rayalign.storage.cache import local_folder, working
from rayalign.storage.disk import room_for
from rayalign.storage.manifest import commit, read_manifest
from rayalign.storage.place import Place

CRITIC = "critic"
"""The critic's folder in a checkpoint."""


@dataclass(slots=True, kw_only=True)
class Critic:
    """One worker's critic, and where it stands between steps."""

    spec: CriticSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    runner: Runner
    optimizer: torch.optim.Optimizer
    version: str = ""
    """Version of the values that the round in progress was prepared with."""
    stopped_at: tuple[int, int] | None = None
    """(round, pass) in which the policy moved too far: later passes over that round are skipped."""
    skipped_steps: int = 0
    """Count over the whole run so far."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer; plain JSON values."""
        return {
            "version": self.version,
            "stopped_at": list(self.stopped_at) if self.stopped_at else None,
            "skipped_steps": self.skipped_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.stopped_at = tuple(state["stopped_at"]) if state["stopped_at"] else None
        self.skipped_steps = state["skipped_steps"]

    def written(self, copied: bool) -> SharedWrite:
        """What writes weights, tokenizer and optimizer: see :class:`rayalign.engine.checkpoint.saving.Beside`."""
        strategy = self.runner.strategy
        state, held = strategy.full_state(self.model), strategy.optimizer_state(self.optimizer)
        if copied:
            held = copy_to_host(held)
        if copied and strategy.rank == 0:
            state = copy_to_host(state, of=self.model)

        def write(directory: Path, group: dist.ProcessGroup | None) -> None:
            strategy.save_optimizer(held, directory / CRITIC, group=group)
            if strategy.rank == 0:
                save_pretrained(self.model, self.tokenizer, directory / CRITIC, state=state)

        return write


def train_with_critic(
    spec: TrainSpec,
    make_batches: MakeBatches,
    strategy: Strategy,
    *,
    rounds: Rounds,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
    notices: Notices | None = None,
) -> Place:
    """Train policy and critic to the last step and return the policy's exported ``final/``; otherwise as
    :func:`rayalign.engine.loop.train_policy`, whose errors it raises too.
    """
    run, resumed = begin_training(spec, strategy, stop, notices)
    critic = begin_critic(run, resumed)
    batches = make_batches(run.layout, pad_id_of(run))
    if resumed is not None:
        rounds.restore(resumed.facts["source"])
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(asynchronous=spec.checkpoint.asynchronous, strategy=strategy))
        keep = partial(save_checkpoint, run, writer, rounds, beside=critic)
        sinks = open_sinks(spec.directory, spec.track, spec.identity, run.step) if strategy.rank == 0 else []
        for sink in sinks:
            stack.callback(sink.close)
        opened: int | None = None
        while run.step < spec.steps and not run.stopping:
            writer.check()
            offer_weights(run, rounds)
            number, _ = rounds.place(run.step)
            clocks: Mapping[str, float] = {}
            if number != opened:
                if not wait_for_groups(run, rounds):
                    break
                clocks = open_round(run, critic, rounds)
                opened = number
            skipped = is_step_skipped(critic, rounds.place(run.step))
            row = skip_critic_step(run, critic) if skipped else step(run, critic, batches, rounds)
            row |= {name: seconds + row.get(name, 0.0) for name, seconds in clocks.items()}
            for sink in sinks:
                sink.write(row)
            if strategy.rank == 0:
                on_step(row)
            if checkpoint_is_due(run):
                flush(sinks)
                keep(facts={CRITIC: critic.state()})
        refuse_stopped(run, writer, lambda: keep(facts={CRITIC: critic.state()}))
    export_critic(run, critic)
    export_final(run)
    return spec.directory / "final"


def begin_critic(run: Run, resumed: Checkpoint | None) -> Critic:
    """Load the critic, as the policy's checkpoint has it where there is one; both are read in one layout."""
    spec = run.spec.critic
    method, config = main_objective(run).method, main_objective(run).config
    assert spec is not None and method.critic is not None
    if resumed is None:
        model, tokenizer = run.strategy.load(spec.model)
    else:
        with local_folder(resumed.directory) as folder:
            model, tokenizer = run.strategy.load(spec.model.at(folder / CRITIC))
    attention = attention_of(model, run.strategy)
    run.layout = common_layout(run.layout, attention.layout)
    module, optimizer = run.strategy.wrap(
        root_module(model, attention), spec.optim, compute_dtype=run.runner.compute_dtype
    )
    objective = Objective(stream=MAIN_STREAM, method=method.critic, config=config)
    critic = Critic(
        spec=spec,
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        runner=replace(run.runner, module=module, objectives={MAIN_STREAM: objective}),
        optimizer=optimizer,
    )
    if resumed is not None:
        load_optimizer(run, critic.optimizer, resumed.directory, part=CRITIC)
        critic.restore(resumed.facts[CRITIC])
    return critic


def pad_id_of(run: Run) -> int:
    return int(run.tokenizer.pad_token_id or 0)


def main_objective(run: Run) -> Objective:
    return run.runner.objectives[MAIN_STREAM]


def open_round(run: Run, critic: Critic, rounds: Rounds) -> dict[str, float]:
    """Value the round that this step begins, or find the values of one that was begun before a restart.

    Returns what it adds to the clocks of the step's row.
    """
    began = waited = time.perf_counter()
    begins = run.step == 0 or rounds.place(run.step)[0] != rounds.place(run.step - 1)[0]
    if begins:
        critic.version = f"step_{run.step:06d}-{run.checkpointer.attempt}"
        work = rounds.whole_round(run.step, layout=run.layout, pad_id=pad_id_of(run))
        waited = time.perf_counter()
        values = round_values(critic, work)
        if run.strategy.rank == 0:
            rounds.commit_values(run.step, critic.version, values)
    rounds.use_values(run.step, critic.version)
    done = time.perf_counter()
    return {
        "seconds": done - began,
        "seconds_waiting_for_data": waited - began,
        "seconds_valuing": done - waited,
    }


@torch.no_grad()
def round_values(critic: Critic, work: RoundWork) -> Tensor:
    """What the critic says of the state before every token of a round [N], float32 on the CPU; on every worker."""
    strategy = critic.runner.strategy
    values = torch.zeros(work.num_tokens, device=strategy.device)
    for batch in work.micro_batches:
        scored = critic.runner.score(critic.objective, batch)
        if not batch.candidate_mask.any():
            continue  # a dummy: its group is another micro-batch's
        group = batch.candidate_of // batch.candidate_mask.shape[1]
        sizes = torch.bincount(group, minlength=len(batch.group_index))
        inside = torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group]
        place = work.first_token[batch.group_index[group]] + inside
        values[place.to(values.device)] = scored.token("value").to(values.dtype)
    return strategy.all_sum(values).cpu()


def step(run: Run, critic: Critic, batches: Batches, rounds: Rounds) -> dict[str, Any]:
    """One step of both models and its row of metrics; notes in which pass over a round the limit is exceeded."""
    objective, place = main_objective(run), rounds.place(run.step)
    row = train_one_step(run, batches, rounds, update=partial(update_with_critic, critic=critic))
    assert row is not None  # its round is open
    limit = objective.method.round_limit(objective.config) if objective.method.round_limit is not None else None
    if limit is None:
        return row
    name, largest = limit
    # Every worker has the same sum; that they also go the same way must not hang on its last bit.
    if run.strategy.broadcast(row.get(name, 0.0) > largest) and critic.stopped_at is None:
        critic.stopped_at = place
    return {**row, "skipped_steps": run.skipped_steps + critic.skipped_steps}


def update_with_critic(run: Run, work: Sequence[StreamWork], *, critic: Critic) -> StepResult:
    """The gradients of both models on the same groups, then both updates: none where one gradient is not finite.

    DeepSpeed updates the policy before the critic's gradient is known; there such a step ends the run, and is not kept.
    """
    own = [part for part in work if part.stream == MAIN_STREAM]
    most = run.spec.optim.max_grad_norm
    rate = learning_rate(critic.spec.optim, run.step, steps=run.spec.steps)
    set_learning_rate(critic.optimizer, rate)
    policy = run.runner.gradient(run.step, work, optimizer=run.optimizer, max_grad_norm=most)
    values = critic.runner.gradient(
        run.step, own, optimizer=critic.optimizer, max_grad_norm=critic.spec.optim.max_grad_norm
    )
    run.optimizer.step()
    critic.optimizer.step()
    said = {"loss": values.loss, "grad_norm": values.grad_norm, "learning_rate": rate}
    return replace(
        policy,
        metrics={**policy.metrics, **{f"critic/{name}": value for name, value in said.items()}, **values.metrics},
    )


def is_step_skipped(critic: Critic, place: tuple[int, int]) -> bool:
    """Whether the policy moved too far in an earlier pass over this round."""
    if critic.stopped_at is not None and critic.stopped_at[0] != place[0]:
        critic.stopped_at = None
    return critic.stopped_at is not None and place[1] > critic.stopped_at[1]


def skip_critic_step(run: Run, critic: Critic) -> dict[str, Any]:
    """A step that trains nothing, and its row: it has its place in the plan, as the learning rate has."""
    began = time.perf_counter()
    run.step += 1
    run.urgent = False  # the step before was saved
    critic.skipped_steps += 1
    waited, run.seconds_saving = run.seconds_saving, 0.0
    return {
        "step": run.step,
        "num_tokens": run.num_tokens,
        "step_tokens": 0,
        "workers": run.strategy.world_size,
        "skipped_steps": run.skipped_steps + critic.skipped_steps,
        "seconds": time.perf_counter() - began,
        "seconds_saving": waited,
    }


def export_critic(run: Run, critic: Critic) -> None:
    """Write ``final_critic/`` once, as :func:`rayalign.engine.loop.export_final` does ``final/``."""
    final = run.spec.directory / "final_critic"
    if run.strategy.broadcast(read_manifest(final) is not None):
        return
    state = run.strategy.full_state(critic.model)
    if run.strategy.rank == 0:
        with room_for(final, num_bytes(state)):
            with working(final) as folder:
                save_pretrained(critic.model, critic.tokenizer, folder, state=state, precision=run.spec.saved)
            commit(final, {"step": run.step, "identity": dict(run.spec.identity)})
