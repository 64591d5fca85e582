"""Measure the cells of a comparison of this world on several seeds, without starting Ray, and print tables.

    python -m examples.lab.measure --seeds 10 11 12 13 14 --out lab.json

Everything but the seed is what the YAML says. All cells of ``quickstart.yaml`` take about six minutes of one quiet core
per seed. With ``--cells`` only these are trained, and the fixed pairs are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rayalign.comparison.evaluate import evaluated_checkpoints
from rayalign.config import load_compare
from rayalign.config.compare import Comparison, started_from
from rayalign.config.data import DataSource
from rayalign.config.method import MethodChoice
from rayalign.config.model import ModelConfig
from rayalign.config.run import RunConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.engine.frozen import FrozenModel
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.judge.measure import Prompt, make_scorers, measure_samples, sample_replies
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import FrozenEngine
from rayalign.run.model import stop_ids

from .claims import claims_table
from .in_process import CPU, Workshop, prompts_of, scoring_spec
from .results import Margin, Point, Results, margins_table, points_table

EXAMPLES = Path(__file__).parents[1]
QUICKSTART = EXAMPLES / "quickstart.yaml"
REFERENCE = "reference"
FLUENCY = ("grammatical", "right_thing")

FIXED_PAIRS, FIXED_STEPS = 16, (20, 40, 80)
FIXED_METHODS: Mapping[str, Mapping[str, object]] = {
    "dpo": {"name": "dpo", "beta": 0.5},
    "cdpo": {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "exo_pref": {"name": "exo_pref", "beta_pi": 0.5, "label_smoothing": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1, "normalize": "sum"},
    "mpo alone": {"name": "mpo", "tau": 0.1, "normalize": "sum"},
}
"""Trained on a few fixed pairs until the margins stop growing, or do not."""
BETA = {"dpo": "beta", "exo_pref": "beta_pi", "ipo": "tau", "mpo": "tau"}
"""Method → its parameter β, where ``rewards/*`` are β · log(π/π_ref)."""


def quickstart() -> Comparison:
    return comparison_of(QUICKSTART)


def comparison_of(path: Path) -> Comparison:
    """The comparison of a YAML in ``examples/``; the modules beside it can be imported from here on."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return load_compare(path)


def cell_runs(comparison: Comparison) -> dict[str, RunConfig]:
    """Name → run, as the YAML's ``as:`` calls them."""
    return {cell.label.removesuffix(" (no KL)"): cell.run for cell in comparison.cells if cell.run is not None}


def measure_seed(
    seed: int, initial: RunConfig, cells: Mapping[str, RunConfig], folder: Path, *, fixed_pairs: bool = True
) -> Results:
    """Train the initial model and every cell in the world of ``seed``, and measure all of them."""
    began = time.perf_counter()
    workshop = Workshop(folder=folder)
    model = str(workshop.train(with_seed(initial, seed), "initial"))
    runs = {name: started_from(with_seed(run, seed), model) for name, run in cells.items()}
    first = next(iter(runs.values()))
    measuring = Measuring(first)
    points = measuring.points(REFERENCE, 0, Path(model))
    for number, (name, run) in enumerate(runs.items()):
        assert run.evaluate is not None
        workshop.train(run, f"cell_{number}")
        checkpoints = evaluated_checkpoints(folder / f"cell_{number}")
        for step in run.evaluate.at:
            points += measuring.points(name, step, checkpoints[step])
        print(f"seed {seed}, {time.perf_counter() - began:.0f} s: {name}", flush=True)
    return Results(points=tuple(points), margins=fixed_pair_margins(first, workshop) if fixed_pairs else ())


def with_seed(run: RunConfig, seed: int) -> RunConfig:
    """The run with another seed, which is also that of all its rows."""

    def reseeded(sources: Iterable[DataSource]) -> tuple[DataSource, ...]:
        return tuple(source.model_copy(update={"arguments": {**source.arguments, "seed": seed}}) for source in sources)

    update: dict[str, object] = {"seed": seed, "data": run.data.model_copy(update={"train": reseeded(run.data.train)})}
    if run.auxiliary:
        update["auxiliary"] = tuple(s.model_copy(update={"data": reseeded(s.data)}) for s in run.auxiliary)
    if run.evaluate:
        update["evaluate"] = run.evaluate.model_copy(update={"prompts": reseeded(run.evaluate.prompts)})
    return run.model_copy(update=update)


class Measuring:
    """What the YAML measures of a policy, and how fluent its replies are; the same for every policy of one seed."""

    def __init__(self, run: RunConfig) -> None:
        assert run.evaluate is not None
        self.run = run
        self.reference = FrozenModel(scoring_spec(run), CPU)
        self.prompts = {source.label: prompts_of(run, source) for source in run.evaluate.prompts}
        self.sampling = SamplingParams(
            max_new_tokens=run.evaluate.sampling.max_new_tokens, seed=run.seed, stop_ids=stop_ids(run)
        )
        fluency = [RuleScorerConfig(function=f"lab.world:{name}") for name in FLUENCY]
        self.scorers = make_scorers([*run.evaluate.all_scorers, *fluency])
        self.tokenizer = load_tokenizer(Path(run.model.name))

    def points(self, cell: str, step: int, checkpoint: Path) -> list[Point]:
        policy = FrozenModel(scoring_spec(self.run, ModelSpec(config=ModelConfig(name=str(checkpoint)))), CPU)
        return [self.point(cell, step, family, policy, prompts) for family, prompts in self.prompts.items()]

    def point(self, cell: str, step: int, family: str, policy: FrozenModel, prompts: tuple[Prompt, ...]) -> Point:
        drawn = sample_replies(FrozenEngine(policy), prompts, self.sampling, tokenizer=self.tokenizer)
        found = measure_samples(policy, self.reference, prompts, drawn, self.scorers)
        return Point(
            seed=self.run.seed,
            cell=cell,
            step=step,
            family=family,
            kl=float(found.k1.mean()),
            tokens=float(found.length.mean()),
            ended=float(found.finished.mean()),
            **{label: float(table.mean()) for label, table in found.scores.items()},
        )


def fixed_pair_margins(run: RunConfig, workshop: Workshop) -> tuple[Margin, ...]:
    """Full-batch training on a few pairs at the YAML's learning rate: does the margin stop where the method says?"""
    [pairs] = run.data.train
    few = pairs.model_copy(update={"arguments": {**pairs.arguments, "n": FIXED_PAIRS}})
    optim = {"steps": FIXED_STEPS[-1] + 1, "groups_per_step": FIXED_PAIRS, "warmup": 0.0}
    margins = []
    for name, method in FIXED_METHODS.items():
        choice = MethodChoice.parse(method)
        fixed = run.model_copy(
            update={
                "data": run.data.model_copy(update={"train": (few,)}),
                "method": choice,
                "optim": run.optim.model_copy(update=optim),
                "auxiliary": None,
                "weighting": None,
                "evaluate": None,
            }
        )
        workshop.train(fixed, f"fixed_{name}")
        beta = getattr(choice.config, BETA[choice.name])
        with (workshop.folder / f"fixed_{name}" / "metrics.jsonl").open() as rows:
            nats = [json.loads(row)["rewards/margins"] / beta for row in rows]
        # a row's metrics are those before its update, so row s stands for s updates
        margins += [Margin(seed=run.seed, method=name, step=step, nats=nats[step] - nats[0]) for step in FIXED_STEPS]
    return tuple(margins)


def main() -> None:
    known = cell_runs(quickstart())
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--cells", nargs="+", choices=known, default=list(known), metavar="CELL", help=", ".join(known))
    parser.add_argument("--out", type=Path, default=Path("lab.json"), help="every number as JSON")
    options = parser.parse_args()
    cells = {name: known[name] for name in options.cells}
    results = measure_seeds(options.seeds, quickstart(), cells, options.out, fixed_pairs=len(cells) == len(known))
    tables = [points_table(results), margins_table(results) if results.margins else "", claims_table(results)]
    print(*filter(None, tables), sep="\n\n")


def measure_seeds(
    seeds: Iterable[int], comparison: Comparison, cells: Mapping[str, RunConfig], out: Path, *, fixed_pairs: bool
) -> Results:
    """Measure every seed on one thread, each in a folder of its own; ``out`` holds those that are finished."""
    assert comparison.initial is not None
    torch.set_num_threads(1)
    disable_progress_bar()
    results = Results()
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="rayalign-lab-") as folder:
            results += measure_seed(seed, comparison.initial, cells, Path(folder), fixed_pairs=fixed_pairs)
        out.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
