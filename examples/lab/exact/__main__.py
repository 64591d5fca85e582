"""Run the exact experiments and write their results, figures and page.

python -m examples.lab.exact                       # all of them, on the seeds that decide: writes beside this file
python -m examples.lab.exact e1 e7 --seeds 20 21   # some of them: writes into runs/lab-exact
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .page import EXPERIMENTS, SEEDS, Run, write
from .record import Measured, claims_table, judged

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"none: all of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="folder; none: the page's for its seeds, runs/lab-exact for others")
    options = parser.parse_args()
    unknown = sorted(set(options.experiments) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"no experiment is called {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    out = options.out or (HERE if tuple(options.seeds) == SEEDS else Path("runs/lab-exact"))
    torch.set_num_threads(1)
    for name in options.experiments or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        began, seeds = time.process_time(), {}
        for seed in dict.fromkeys(options.seeds):
            seeds[seed] = Measured(points=experiment.measure(seed))
        run = Run(seeds=seeds, seconds=time.process_time() - began)
        write(out, {name: run})
        print(f"{name}: {experiment.title} ({run.seconds:.0f} s)")
        found = judged(experiment, list(seeds.values()))
        print(claims_table(found, list(seeds), experiment.digits), end="\n\n", flush=True)
    print(f"results, figures and page: {out}")


if __name__ == "__main__":
    main()
