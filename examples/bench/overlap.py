"""What overlapping saves: the same on-policy run with lag 0 and lag 1, and with trainer and engine taking turns.

    python -m examples.bench.overlap [--quick]

A step's seconds hold its wait for the round; rounds before the third do not count, since processes start meanwhile.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console

from rayalign.engine.metrics import read_metrics
from rayalign.run.train import train
from rayalign.runtime.session import connect

from .common import arguments, machine, pairs_file, spread, table, train_tokenizer, write_model
from .offline_step import TOKENIZER_VOCABULARY

STEPS_PER_ROUND, WARM_UP_ROUNDS = 2, 2
SIDES: dict[str, dict[str, Any]] = {
    "lag 0, cores of their own": {"lag": 0, "placement": "separate"},
    "lag 1, cores of their own": {"lag": 1, "placement": "separate"},
    "lag 0, all cores in turns": {"lag": 0, "placement": "shared"},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, taking turns")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats = WARM_UP_ROUNDS + 1, 1
    print(machine())
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder, connect(import_paths=[Path(folder)]):
        write_inputs(Path(folder))
        for turn in range(options.repeats):
            for side in SIDES:
                found[side].append(seconds_per_step(Path(folder), side, turn, options.rounds))
    print(f"{options.rounds} rounds of {STEPS_PER_ROUND} steps, 16 prompts a step, 4 samples of 48 tokens; DPO")
    rows = [
        [side, spread([step for step, _ in runs], 2), spread([waited for _, waited in runs], 2)]
        for side, runs in found.items()
    ]
    print(table(("", "s a step", "of them waiting"), rows))
    first, *others = SIDES
    for side in others:
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(found[side], found[first], strict=True)]
        print(f"{side} : {first}, turn by turn: {spread(ratios, 2)} ×")


def write_inputs(folder: Path) -> None:
    file = pairs_file()
    tokenizer = train_tokenizer(file, TOKENIZER_VOCABULARY)
    write_model(folder / "model", tokenizer, TOKENIZER_VOCABULARY)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        (folder / "pairs.jsonl").write_text("".join(line for line, _ in zip(lines, range(256), strict=False)))
    (folder / "lengths.py").write_text("def score(prompt, reply):\n    return float(len(reply) % 97)\n")


def seconds_per_step(folder: Path, side: str, turn: int, rounds: int) -> tuple[float, float]:
    """Mean seconds of a step and of its wait, after the rounds that do not count."""
    setting = SIDES[side]
    name = f"{side.replace(' ', '-').replace(',', '')}-{turn}"
    run = {
        "name": name,
        "storage_path": str(folder / "runs"),
        "model": {"name": str(folder / "model")},
        "data": {"train": [str(folder / "pairs.jsonl")], "max_prompt_tokens": 128, "max_tokens": 256},
        "method": {"name": "dpo"},
        "data_policy": {"name": "on_policy", "refresh_every": STEPS_PER_ROUND, "lag": setting["lag"]},
        "rollout": {"engine": "hf", "samples": 4, "max_new_tokens": 48, "placement": setting["placement"]},
        "scorer": {"name": "rule", "function": "lengths:score"},
        "optim": {"lr": 1e-5, "steps": STEPS_PER_ROUND * rounds, "groups_per_step": 16},
        "checkpoint": {"every": 10_000},
        "track": [],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run))
    with (folder / "output.txt").open("w") as output:
        train(path, [], fresh=frozenset(), console=Console(file=output))
    rows = read_metrics(folder / "runs" / name / "metrics.jsonl")[STEPS_PER_ROUND * WARM_UP_ROUNDS :]
    return mean(row["seconds"] for row in rows), mean(row["seconds_waiting_for_data"] for row in rows)


if __name__ == "__main__":
    main()
