"""What Ray Train costs: the same run in a bare process and under Ray Train, taking turns.

    python -m examples.bench.ray_cost [--quick]

Prints the median step of both, their ratio, and the seconds from the start of the process to the first step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rayalign.config.training import StrategyConfig
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.placement import Share
from rayalign.runtime.session import connect
from rayalign.runtime.trainer import Trainer
from rayalign.runtime.worker import TrainJob

from .common import arguments, in_fresh_process, machine, pairs_file, spread, table, train_tokenizer, write_model
from .offline_sides import rayalign_reference, rayalign_train, training
from .offline_step import MAX_TOKENS, TOKENIZER_VOCABULARY, TOKENS_PER_MICRO_BATCH, tokenized_pairs

WARM_UP = 32
"""Steps that do not count: Ray's own processes are still starting meanwhile."""

BARE, RAY = "bare process", "Ray Train"
Record = dict[str, Any]


def main() -> None:
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_file():
        return measured(Path(sys.argv[1]), Path(sys.argv[2]))
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, taking turns")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = WARM_UP + 8, 1
    print(machine())
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder:
        job = write_job(Path(folder), steps=options.steps) | {"threads": options.threads}
        rayalign_reference(job)
        runs: dict[str, list[Record]] = {BARE: [], RAY: []}
        for _ in range(options.repeats):
            for side, records in runs.items():
                asked = job | {"side": side, "began": time.time()}
                records.append(in_fresh_process("ray_cost", asked, threads=options.threads))
    print(render(runs))


def write_job(root: Path, *, steps: int) -> Record:
    file = pairs_file()
    tokenizer = train_tokenizer(file, TOKENIZER_VOCABULARY)
    groups = tokenized_pairs(file, tokenizer, 8 * steps)
    commit_store(root / "store", [write_shard(root / "store", "pairs", groups)], meta={})
    write_model(root / "model", tokenizer, TOKENIZER_VOCABULARY)
    return {
        "model": str(root / "model"),
        "store": str(root / "store"),
        "columns": str(root / "columns"),
        "batch": 8,
        "steps": steps,
        "max_tokens": MAX_TOKENS,
        "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
    }


def measured(question: Path, answer: Path) -> None:
    """One run of one side in this process."""
    job: Record = json.loads(question.read_text())
    if job["side"] == BARE:
        seen = rayalign_train(job)
        found = {"steps": seen["step_seconds"], "start": seen["first_step_at"] - job["began"]}
    else:
        found = under_ray(job)
    answer.write_text(json.dumps(found))


def under_ray(job: Record) -> Record:
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as directory:
        metrics = Path(directory, "metrics.jsonl")
        with connect() as session, Trainer() as trainer:
            spec, source = training(job, Path(directory))
            share = Share(cpus=session.num_cpus, gpus=0.0, threads=job["threads"])
            trainer.fit(
                TrainJob(
                    spec=spec,
                    source=source,
                    held_out=None,
                    strategy=StrategyConfig(),
                    workers=1,
                    share=share,
                    run="ray_cost",
                )
            )
            ended = metrics.stat().st_mtime
            steps = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
        return {"steps": steps, "start": ended - sum(steps[1:]) - job["began"]}


def render(runs: dict[str, list[Record]]) -> str:
    medians = {side: [median(record["steps"][WARM_UP:]) for record in records] for side, records in runs.items()}
    rows = [
        [
            side,
            spread([1000 * value for value in medians[side]], 0),
            spread([record["start"] for record in runs[side]]),
        ]
        for side in runs
    ]
    ratios = [ray / bare for ray, bare in zip(medians[RAY], medians[BARE], strict=True)]
    return "\n".join(
        [
            table(("", "median step ms", "s to the end of the first step"), rows),
            f"{RAY} : {BARE}, median step: {spread(ratios, 3)} ×",
        ]
    )


if __name__ == "__main__":
    main()
