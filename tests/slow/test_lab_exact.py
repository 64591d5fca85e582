"""The exact experiments once more, on one of their seeds: what held on all of them holds again."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.exact.page import EXPERIMENTS, RESULTS, load
from lab.exact.record import Measured, judged

pytestmark = pytest.mark.slow

SEED = 10
FILE = Path(__file__).parents[2] / "examples" / "lab" / "exact" / RESULTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_that_held_hold_again(name: str) -> None:
    experiment = EXPERIMENTS[name]
    held = {
        one.claim.text for one in judged(experiment, list(load(FILE)[name].seeds.values())) if one.verdict == "holds"
    }
    found = Measured(points=experiment.measure(SEED))
    values = {claim.text: (claim.value(found), claim.above) for claim in experiment.claims if claim.text in held}
    assert values and {text: pair for text, pair in values.items() if pair[0] <= pair[1]} == {}
