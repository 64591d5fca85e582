"""Reinforcement learning on the support desk, trained and measured again on its seeds: minutes of one core each."""

from __future__ import annotations

import pytest
from lab.measure import cell_runs, comparison_of, measure_seed
from lab.results import Results
from lab.rl import CONTROL, GATES, REINFORCEMENT, SEEDS, means

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    comparison = comparison_of(REINFORCEMENT)
    assert comparison.initial is not None
    runs = cell_runs(comparison)
    cells = {name: runs[name] for name in (*GATES, CONTROL)}
    measured = Results()
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"seed_{seed}")
        measured += measure_seed(seed, comparison.initial, cells, folder, fixed_pairs=False)
    return measured


@pytest.mark.parametrize("cell", GATES)
def test_what_is_gained_is_worth_having(cell: str, results: Results) -> None:
    found = means(results, cell)
    assert GATES[cell].passed(found), found


def test_without_a_kl_the_oracle_is_hacked(results: Results) -> None:
    """More oracle than with it, and the gate notices: it travels too far for less audit2."""
    found, held = means(results, CONTROL), means(results, "rloo")
    assert found.oracle > held.oracle
    assert not GATES["rloo"].passed(found), found
