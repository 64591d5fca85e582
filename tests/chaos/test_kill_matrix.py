"""Kill -9 everywhere: the run ends in the same bits, and every group is seen exactly once per epoch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from dying_teams import WATCHED_STEP, Fault, Plan, Story, make_plan, run_through, seen
from incidents import Incident
from tiny_runs import Scenario, objective, optimizer_in, save_tiny, store, synthetic_groups

from rayalign.engine.checkpoint.checkpoint import step_of
from rayalign.engine.metrics import read_metrics
from rayalign.engine.strategy.base import Name
from rayalign.storage.manifest import verify

GROUPS, GROUPS_PER_STEP, STEPS = 10, 4, 5
"""Two epochs; the third step straddles them."""
STRATEGIES: tuple[Name, ...] = ("single", "ddp", "fsdp2")


@dataclass(frozen=True, slots=True)
class World:
    folder: Path
    scenario: Scenario
    undisturbed: dict[Name, Plan]

    def whole(self, strategy: Name) -> Plan:
        """The undisturbed run, which is made when it is first asked for."""
        if strategy not in self.undisturbed:
            plan = make_plan(self.folder, self.scenario, strategy, name=f"whole-{strategy}")
            run_through(plan, [])
            self.undisturbed[strategy] = plan
        return self.undisturbed[strategy]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("matrix")
    model = save_tiny(folder / "model", "llama_tied")
    pairs = store(folder / "pairs", synthetic_groups([2] * GROUPS), reference=model, groups_per_step=GROUPS_PER_STEP)
    scenario = Scenario(
        model=model,
        streams=(pairs,),
        objectives=(objective("dpo"),),
        steps=STEPS,
        tokens_per_micro_batch=52,  # one pair each, so that every worker has two
        row_tokens=52,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYALIGN_CACHE", str(folder / "cache"))
        yield World(folder, scenario, {})


def final_bytes(plan: Plan) -> list[tuple[str, bytes]]:
    """Final weights, and the last checkpoint's weights and optimizer."""
    final = plan.spec.directory / "final"
    [last] = (path for path in (plan.spec.directory / "checkpoints").iterdir() if step_of(path) == STEPS)
    for whole in (final, last):
        verify(whole)
    files = [final / "model.safetensors", last / "model.safetensors"]
    optimizer = sorted(optimizer_in(last).items())
    return [
        *((path.name, path.read_bytes()) for path in files),
        *((name, tensor.numpy().tobytes()) for name, tensor in optimizer),
    ]


def curve(plan: Plan) -> list[dict[str, object]]:
    rows = read_metrics(plan.spec.directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def lost_and_repeated(plan: Plan) -> tuple[int, int]:
    """Groups that an epoch lacks, and those that it has more than once, by position and by name."""
    found = seen(plan)
    places = Counter(place for _, place, _ in found)
    names = Counter((place // GROUPS, name) for _, place, name in found)
    every = GROUPS_PER_STEP * STEPS
    assert len({name for _, _, name in found}) <= GROUPS
    lost = sum(place not in places for place in range(every)) + GROUPS * (every // GROUPS) - len(names)
    repeated = sum(count - 1 for count in places.values()) + sum(count - 1 for count in names.values())
    return lost, repeated


def judge(plan: Plan, whole: Plan, story: Story, fault: str) -> Incident:
    lost, repeated = lost_and_repeated(plan)
    equal = final_bytes(plan) == final_bytes(whole) and curve(plan) == curve(whole)
    return Incident(
        fault=f"{plan.strategy}: killed {fault}",
        injected=story.injected,
        recoveries=story.recoveries,
        lost=lost,
        repeated=repeated,
        equal=equal,
        seconds=story.seconds,
    )


def check(incident: Incident, incidents: list[Incident]) -> None:
    incidents.append(incident)
    assert incident.recoveries == incident.injected > 0
    assert (incident.lost, incident.repeated, incident.equal) == (0, 0, True)


def spread(strategy: Name, number: int) -> int:
    """The rank that dies: one after the other."""
    return number % 2 if strategy != "single" else 0


PLACES = {
    "at every step boundary": [*(("before step", step) for step in range(STEPS)), ("end", STEPS)],
    "inside every step": [("inside step", step) for step in range(STEPS)],
    "after every update": [("after update", step) for step in range(STEPS)],
}


def faults_of(where: str, strategy: Name, *, shift: int = 0) -> list[Fault]:
    """``end`` is told by rank 0 alone; every other place falls to each rank in turn."""
    return [
        Fault(place=place, step=step, rank=0 if place == "end" else spread(strategy, number + shift))
        for number, (place, step) in enumerate(PLACES[where])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_in_steps(strategy: Name, where: str, world: World, incidents: list[Incident], tmp_path: Path) -> None:
    """One run per place dies at each of its steps, one attempt after the other; with two workers each of them does."""
    whole = world.whole(strategy)
    for shift in range(1 if strategy == "single" else 2):
        plan = make_plan(tmp_path, world.scenario, strategy, name=f"run-{shift}")
        story = run_through(plan, faults_of(where, strategy, shift=shift))
        who = f" (rank {shift} first)" if strategy != "single" else ""
        check(judge(plan, whole, story, f"{where}{who}"), incidents)


@pytest.mark.parametrize(
    "asynchronous",
    [pytest.param(False, id="waiting", marks=pytest.mark.slow), pytest.param(True, id="beside training")],
)
def test_killed_at_a_step_and_between_manifest_and_name(
    asynchronous: bool, world: World, incidents: list[Incident], tmp_path: Path
) -> None:
    """The two kills that matter most, for every change of the code; the whole matrix is slow."""
    whole = world.whole("single")
    plan = make_plan(tmp_path, world.scenario, "single", asynchronous=asynchronous)
    renaming = changes_of(whole, 0).index(COMMIT)
    faults = [Fault(place="before step", step=3), Fault(place="file", step=WATCHED_STEP, number=renaming)]
    check(judge(plan, whole, run_through(plan, faults), "at a step, and before a manifest has its name"), incidents)


def changes_of(whole: Plan, rank: int) -> list[str]:
    """What happens to the files of the watched checkpoint, in order: written, committed, and the old one's removal."""
    found: list[str] = json.loads((whole.notes / f"changes-{rank}.json").read_text())
    return found


COMMIT = "renamed MANIFEST.json"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "beside training"])
@pytest.mark.parametrize(("strategy", "rank"), [("single", 0), ("ddp", 0), ("fsdp2", 0), ("fsdp2", 1)])
def test_killed_while_a_checkpoint_is_written(
    strategy: Name, rank: int, asynchronous: bool, world: World, incidents: list[Incident], tmp_path: Path
) -> None:
    """At every change of a file until the checkpoint counts, and in the middle of each large file."""
    whole = world.whole(strategy)
    changes = changes_of(whole, rank)
    written = changes[: changes.index(COMMIT) + 1] if rank == 0 else changes
    assert any("distcp" in change for change in written) and len(written) >= (12 if rank == 0 else 3)
    plan = make_plan(tmp_path, world.scenario, strategy, asynchronous=asynchronous)
    faults = [Fault(place="file", step=WATCHED_STEP, rank=rank, number=number) for number in range(len(written))]
    beside = ", written beside training" if asynchronous else ""
    fault = f"at each of {len(written)} changes of a checkpoint's files (rank {rank}{beside})"
    check(judge(plan, whole, run_through(plan, faults), fault), incidents)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_while_the_old_checkpoint_goes(
    strategy: Name, world: World, incidents: list[Incident], tmp_path: Path
) -> None:
    """At every removal of a file for one process; at the first, one in the middle and the last one for two."""
    whole = world.whole(strategy)
    changes = changes_of(whole, 0)
    removals = range(changes.index(COMMIT) + 1, len(changes))
    assert len(removals) > 5
    chosen = removals if strategy == "single" else (removals[0], removals[len(removals) // 2], removals[-1])
    for number in chosen:
        plan = make_plan(tmp_path, world.scenario, strategy, name=f"run-{number}")
        story = run_through(plan, [Fault(place="file", step=WATCHED_STEP, number=number)])
        check(judge(plan, whole, story, f"before: {changes[number]} (old checkpoint)"), incidents)


def test_a_group_that_is_lost_or_repeated_is_noticed(world: World, tmp_path: Path) -> None:
    """The count of groups is no tautology: notes of a resume at the wrong step are told."""
    whole = world.whole("single")
    assert lost_and_repeated(whole) == (0, 0)
    for shift, expected in ((1, "lost"), (-1, "repeated")):
        notes = shutil.copytree(whole.notes, tmp_path / expected)
        lines = [json.loads(line) for line in (notes / "groups-0-0.jsonl").read_text().splitlines()]
        resumed = [{**entry, "attempt": 1, "step": entry["step"] + shift} for entry in lines if entry["step"] >= 2]
        if expected == "lost":
            resumed = resumed[:-1]
        (notes / "groups-1-0.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in resumed))
        assert any(lost_and_repeated(replace(whole, notes=notes)))
