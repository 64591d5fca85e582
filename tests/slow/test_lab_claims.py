"""What the support desk is said to show, trained and measured again: some minutes of one core per seed."""

from __future__ import annotations

import pytest
from lab.claims import CLAIMS, Claim
from lab.measure import cell_runs, measure_seed, quickstart
from lab.results import Results

pytestmark = pytest.mark.slow

SEEDS = (10,)
CELLS = ("dpo", "dpo + sft term", "mpo", "mpo alone", "wpo", "wpo permuted", "dpo + filter 0.7")
CELLS += ("dpo on-policy", "dpo once", "dpo hybrid")
NOT_SHOWN = (
    "initial model: the right thing is named",
    "oracle at 100: wpo − (dpo + filter 0.7)",  # contradicted
    "oracle at 50: dpo on-policy − dpo once",
)
"""Not on every seed of examples/lab/README.md."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    comparison = quickstart()
    assert comparison.initial is not None
    runs = cell_runs(comparison)
    cells = {name: runs[name] for name in CELLS}
    measured = Results()
    for seed in SEEDS:
        measured += measure_seed(seed, comparison.initial, cells, tmp_path_factory.mktemp(f"seed_{seed}"))
    return measured


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS if claim.text not in NOT_SHOWN], ids=lambda claim: claim.text
)
def test_claim_holds_on_every_seed(claim: Claim, results: Results) -> None:
    values = {seed: claim.value(results.of(seed)) for seed in SEEDS}
    assert min(values.values()) > claim.above, values
