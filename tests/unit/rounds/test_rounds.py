"""Which round serves which step, with which weights; and the folder through which rounds are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rayalign.engine.batches import Weights
from rayalign.rounds.folder import Request, RoundFolder
from rayalign.rounds.plan import RoundPlan

PLAN = RoundPlan(steps=10, refresh_every=4, lag=0, groups_per_step=6)
WEIGHTS = Weights(
    step=4,
    attempt="a1",
    digest="d" * 64,
    directory=Path("weights/step_000004-a1"),
    canary=(-1.5, -2.0),
    num_bytes=12,
)


def test_a_synchronous_round_is_drawn_with_the_weights_of_its_first_step() -> None:
    assert PLAN.num_rounds == 3
    assert [PLAN.round_of(step) for step in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [PLAN.weights_step(number) for number in range(3)] == [0, 4, 8]
    assert [list(PLAN.rounds_drawn_at(step)) for step in range(10)] == [[0], [], [], [], [1], [], [], [], [2], []]


def test_with_a_lag_the_next_round_is_drawn_while_one_trains() -> None:
    plan = replace(PLAN, lag=1)
    assert [plan.weights_step(number) for number in range(3)] == [0, 0, 4]
    assert [list(plan.rounds_drawn_at(step)) for step in range(10)] == [[0, 1], [], [], [], [2], [], [], [], [], []]


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3])
def test_every_step_trains_on_its_own_fresh_groups_once(lag: int, fraction: float) -> None:
    plan = replace(PLAN, lag=lag, fresh_fraction=fraction)
    trained = [position for step in range(plan.steps) for position in plan.positions(step)]
    drawn = [position for number in range(plan.num_rounds) for position in plan.round_positions(number)]
    assert trained == drawn == list(range(int(plan.steps * plan.groups_per_step * fraction)))
    for number in range(plan.num_rounds):
        asked = [step for step in range(plan.steps) if number in plan.rounds_drawn_at(step)]
        assert asked == [plan.weights_step(number)]


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_every_pass_goes_over_the_same_groups_in_the_same_steps(passes: int) -> None:
    plan = replace(PLAN, passes=passes)
    width = 4 // passes  # steps of one pass
    for number, steps in enumerate((range(0, 4), range(4, 8), range(8, 10))):
        drawn = plan.round_positions(number)
        assert drawn.start == number * width * 6 and len(drawn) == min(width, len(steps)) * 6
        starts = [drawn.start + 6 * (n % width) for n in range(len(steps))]
        assert [plan.positions(step) for step in steps] == [range(start, start + 6) for start in starts]


@pytest.mark.parametrize("change", [{"passes": 3}, {"passes": 0}, {"passes": 2, "fresh_fraction": 0.5}])
def test_passes_are_whole(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="passes"):
        replace(PLAN, **change)


def test_a_later_request_for_a_round_revokes_the_earlier_one(tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path)
    first = Request(number=1, weights=WEIGHTS)
    second = Request(number=1, weights=replace(WEIGHTS, attempt="a2", digest="e" * 64))
    folder.ask(first)
    assert folder.requests() == [first]
    sent = Request(number=2, weights=replace(WEIGHTS, directory=None, seconds_sending=0.5))
    assert Request.from_json(sent.to_json()) == sent
    folder.ask(second)
    assert folder.requests() == [second]
    assert folder.round(first) != folder.round(second)
    folder.answer(first)  # too late: the weights it was drawn with do not count any more
    assert folder.requests() == [second]
    folder.answer(second)
    assert folder.requests() == []


def test_a_plan_has_steps() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        replace(PLAN, refresh_every=0)
