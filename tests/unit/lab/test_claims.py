"""Claims about the support desk: they name what the quickstart trains, and several seeds decide as they should."""

from __future__ import annotations

import math

import pytest
from lab.claims import CLAIMS, interval, verdict
from lab.measure import FIXED_METHODS, FIXED_STEPS, REFERENCE, cell_runs, quickstart, with_seed
from lab.results import Margin, Point, Results


def results(*seeds: int) -> Results:
    """One point per cell, step and family of the quickstart, as if it had been measured."""
    steps = {REFERENCE: (0,), **{name: run.evaluate.at for name, run in cell_runs(quickstart()).items()}}
    return Results(
        points=tuple(
            Point(
                seed=seed,
                cell=cell,
                step=step,
                family=family,
                oracle=0.5,
                audit2=0.5,
                no_valid_opening=0.0,
                grammatical=0.9,
                right_thing=1.0,
                kl=2.0,
                tokens=30.0,
                ended=1.0,
            )
            for seed in seeds
            for cell, at in steps.items()
            for step in at
            for family in ("shop", "travel")
        ),
        margins=tuple(
            Margin(seed=seed, method=method, step=step, nats=4.0)
            for seed in seeds
            for method in FIXED_METHODS
            for step in FIXED_STEPS
        ),
    )


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_is_about_what_is_measured(claim: object) -> None:
    both = results(3, 4)
    assert both.seeds == (3, 4)
    assert math.isfinite(claim.value(both.of(4)))


def test_interval_by_hand() -> None:
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([5.0], "not shown"),
        ([1.0, 1.1, -0.1], "not shown"),
        ([0.1, 9.0, 0.2], "not shown"),
        ([-1.0, -1.1, -0.9], "contradicted"),
    ],
)
def test_a_claim_holds_on_every_seed_and_with_its_whole_interval(values: list[float], expected: str) -> None:
    assert verdict(values, above=0.0) == expected


def test_a_seed_reaches_the_run_and_all_of_its_rows() -> None:
    runs = cell_runs(quickstart())
    run = with_seed(runs["mpo"], 99)
    sources = [*run.data.train, *run.evaluate.prompts, *(s for stream in run.auxiliary for s in stream.data)]
    assert run.seed == 99 and len(sources) == 4
    assert {source.arguments["seed"] for source in sources} == {99}
    assert run.optim == runs["mpo"].optim and run.method == runs["mpo"].method
