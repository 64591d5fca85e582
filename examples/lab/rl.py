"""Reinforcement learning on this world: a declared search, a gate for what it found, and a control that must fail it.

    python -m examples.lab.rl tune         # every trial, on the tuning seed
    python -m examples.lab.rl report       # every cell of rl.yaml, on seeds that no search has seen

Each method has the same number of trials, each trial and cell the same calls of the oracle.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rayalign.config.method import MethodChoice
from rayalign.config.run import RunConfig

from .measure import EXAMPLES, REFERENCE, cell_runs, comparison_of, measure_seeds
from .results import Results, points_table

REINFORCEMENT = EXAMPLES / "rl.yaml"
TUNING_SEEDS = (16,)
SEEDS = (20, 21, 22)
STEP = 50
METHODS = ("rloo", "reinforce_pp", "grpo", "ppo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    method: str
    lr: float
    kl_coef: float

    @property
    def label(self) -> str:
        return f"{self.method}, lr {self.lr:g}, kl_coef {self.kl_coef:g}"


KL_COEFS: Mapping[str, tuple[float, float]] = {
    "rloo": (0.03, 0.05),
    "reinforce_pp": (0.03, 0.05),
    "grpo": (0.1, 0.3),
    "ppo": (0.03, 0.05),
}
"""GRPO divides rewards by their deviation, about a tenth here, and has its KL beside the advantage."""
TRIALS = tuple(
    Trial(method=method, lr=lr, kl_coef=kl_coef)
    for method in METHODS
    for lr, kl_coef in itertools.product((1.5e-4, 3e-4), KL_COEFS[method])
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """One cell's means at :data:`STEP` on shop prompts, over seeds."""

    oracle: float
    kl: float
    audit2_gain: float
    """Above the reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a policy has to be worth."""

    oracle: float
    """At least."""
    kl: float
    """At most, nats per reply."""
    audit2_gain: float
    """At least: what is trained on must not be bought with what is not."""

    def passed(self, found: Means) -> bool:
        return found.oracle >= self.oracle and found.kl <= self.kl and found.audit2_gain >= self.audit2_gain


TUNING_GATE = Gate(oracle=0.0, kl=4.0, audit2_gain=0.05)
"""The trial that passes it with the highest oracle is taken; where none passes, the one with the highest audit2."""

GATES: Mapping[str, Gate] = {
    "rloo": Gate(oracle=0.77, kl=4.0, audit2_gain=0.05),
    "reinforce_pp": Gate(oracle=0.74, kl=4.0, audit2_gain=0.05),
    "grpo": Gate(oracle=0.70, kl=4.0, audit2_gain=0.05),
    "ppo": Gate(oracle=0.70, kl=4.0, audit2_gain=0.05),
}
"""Cell → what it is held to, over the mean of :data:`SEEDS`; written after the search and before these seeds were run.

RLOO's was given; the others ask for about 0.04 less than the search found."""
CONTROL = "rloo without KL"
"""Must fail RLOO's gate."""


def means(results: Results, cell: str) -> Means:
    """Raises NotMeasured where a seed lacks the cell."""
    points = [results.of(seed).point(cell, STEP, "shop") for seed in results.seeds]
    references = [results.of(seed).point(REFERENCE, 0, "shop") for seed in results.seeds]
    return Means(
        oracle=fmean(point.oracle for point in points),
        kl=fmean(point.kl for point in points),
        audit2_gain=fmean(p.audit2 - r.audit2 for p, r in zip(points, references, strict=True)),
    )


def chosen(results: Results, method: str) -> Trial:
    """The trial that the rule of :data:`TUNING_GATE` takes."""
    found = {trial: means(results, trial.label) for trial in TRIALS if trial.method == method}
    passed = [trial for trial in found if TUNING_GATE.passed(found[trial])]
    if passed:
        return max(passed, key=lambda trial: found[trial].oracle)
    return max(found, key=lambda trial: found[trial].audit2_gain)


def trial_runs(cells: Mapping[str, RunConfig], trials: Iterable[Trial] = TRIALS) -> dict[str, RunConfig]:
    """Label → run: the YAML's cell of that method, but for what is searched; measured at the end alone."""
    runs = {}
    for trial in trials:
        run = cells[trial.method]
        assert run.evaluate is not None
        runs[trial.label] = run.model_copy(
            update={
                "method": MethodChoice.parse({**run.method.dump(), "kl_coef": trial.kl_coef}),
                "optim": run.optim.model_copy(update={"lr": trial.lr}),
                "evaluate": run.evaluate.model_copy(update={"at": (STEP,)}),
            }
        )
    return runs


def tuned_lines(results: Results, trials: Iterable[Trial]) -> Iterable[str]:
    for trial in trials:
        found = means(results, trial.label)
        taken = "taken" if trial == chosen(results, trial.method) else ""
        yield (
            f"| {trial.method} | {trial.lr:g} | {trial.kl_coef:g} | {found.oracle:.3f} | {found.kl:.2f} "
            f"| {found.audit2_gain:+.3f} | {taken} |"
        )


def gate_lines(results: Results, cells: Container[str]) -> Iterable[str]:
    held = {**GATES, CONTROL: GATES["rloo"]}
    for cell, gate in held.items():
        if cell not in cells:
            continue
        found = means(results, cell)
        yield (
            f"| {cell} | {gate.oracle:.2f} | {found.oracle:.3f} | {gate.kl:.1f} | {found.kl:.2f} "
            f"| {gate.audit2_gain:+.2f} | {found.audit2_gain:+.3f} | {'passed' if gate.passed(found) else 'failed'} |"
        )


def main() -> None:
    cells = cell_runs(comparison := comparison_of(REINFORCEMENT))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("tune", "report"))
    parser.add_argument("--cells", nargs="+", choices=cells, default=list(cells), metavar="CELL", help=", ".join(cells))
    parser.add_argument("--out", type=Path, default=Path("rl.json"), help="every number as JSON")
    options = parser.parse_args()
    asked = {name: cells[name] for name in options.cells}
    if options.what == "tune":
        trials = [trial for trial in TRIALS if trial.method in asked]
        results = measure_seeds(TUNING_SEEDS, comparison, trial_runs(asked, trials), options.out, fixed_pairs=False)
        header = "| method | lr | kl_coef | oracle | KL | audit2 − reference's | |"
        print(header, "|---" * 7 + "|", *tuned_lines(results, trials), sep="\n")
    else:
        results = measure_seeds(SEEDS, comparison, asked, options.out, fixed_pairs=False)
        header = "| cell | oracle ≥ | measured | KL ≤ | measured | audit2 − reference's ≥ | measured | |"
        print(header, "|---" * 8 + "|", *gate_lines(results, asked), "", points_table(results), sep="\n")


if __name__ == "__main__":
    main()
