"""The page of results: every number on it is of the results file, every word of the experiments' own files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import e1, e2, e3, e4, e4b, e6, e7, e8
from .figures import render
from .record import Experiment, Judged, Measured, as_json, claims_table, escaped, from_json, judged, points_table

EXPERIMENTS: Mapping[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (e1, e2, e3, e4, e4b, e6, e7, e8)
}
RESULTS, PAGE = "results.json", "README.md"
VERDICTS = ("holds", "not shown", "contradicted")
SEEDS = (10, 11, 12, 13, 14)
"""They decide; the worlds were made with others."""
BANDS = "Where nothing else is said, lines are means over seeds, and bands reach from the lowest to the highest."
SECONDS_OF = "seconds of one core, for all seeds"

HEAD = """# The papers' claims, where everything can be counted

Worlds so small that every completion can be listed: rewards, Kullback–Leibler divergences and optima are sums, not
estimates, and only training is random. The losses, weights and advantages are those of `rayalign.methods` and
`rayalign.functional`.

<!-- not run: some minutes of one core -->
```bash
python -m examples.lab.exact                       # all, on seeds 10 to 14: writes results.json, figures and this page
python -m examples.lab.exact e1 e7 --seeds 20 21   # some of them, into runs/lab-exact
```

A claim *holds* if it is true on every seed and with the whole 95 % t interval over seeds. It is *contradicted* if the
interval lies on the other side, and *not shown* otherwise. Claims and thresholds were committed before these seeds
were run; the worlds were made with other seeds. Some claims were written because a reader may expect them, not because
the trials promised them. Intervals are over seeds of one kind of world, each at one setting, and many claims share
their runs. This page is written by the program.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One experiment on several seeds."""

    seeds: Mapping[int, Measured]
    seconds: float
    """Processor time."""


def write(folder: Path, runs: Mapping[str, Run]) -> None:
    """``results.json``, the page and its figures; experiments of an earlier results file that were not run stay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    known = load(file) if file.exists() else {}
    together = {**known, **runs}
    together = {name: together[name] for name in EXPERIMENTS if name in together}
    file.write_text(dump(together), encoding="utf-8")
    together = load(file)  # so that the page is that of the file, rounding included
    for name, run in together.items():
        (folder / f"{name}.svg").write_bytes(figure(EXPERIMENTS[name], run))
    (folder / PAGE).write_text(page(together), encoding="utf-8")


def figure(experiment: Experiment, run: Run, *, format: str = "svg") -> bytes:
    return render(experiment.name, lambda drawn: experiment.draw(drawn, list(run.seeds.values())), format=format)


def dump(runs: Mapping[str, Run]) -> str:
    """One line per seed."""
    experiments = []
    for name, run in runs.items():
        seeds = [f'   "{seed}": {json.dumps(as_json(found.points))}' for seed, found in run.seeds.items()]
        lines = ",\n".join(seeds)
        experiments.append(f' "{name}": {{\n  "seconds": {run.seconds:.1f},\n  "seeds": {{\n{lines}\n  }}\n }}')
    return "{\n" + ",\n".join(experiments) + "\n}\n"


def load(file: Path) -> dict[str, Run]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Run(
            seeds={int(seed): from_json(rows) for seed, rows in run["seeds"].items()}, seconds=float(run["seconds"])
        )
        for name, run in content.items()
    }


def page(runs: Mapping[str, Run]) -> str:
    found = {name: judged(EXPERIMENTS[name], list(run.seeds.values())) for name, run in runs.items()}
    parts = [HEAD, summary(found, runs)]
    parts += [section(EXPERIMENTS[name], run, found[name]) for name, run in runs.items()]
    return "\n".join(parts)


def summary(found: Mapping[str, Sequence[Judged]], runs: Mapping[str, Run]) -> str:
    """One row per experiment, and what did not hold."""
    lines = [f"| experiment | {' | '.join(VERDICTS)} | {SECONDS_OF} |", "|---" * (len(VERDICTS) + 2) + "|"]
    for name, claims in found.items():
        counts = [str(sum(one.verdict == verdict for one in claims)) for verdict in VERDICTS]
        link = f"[{name.upper()}](#{anchor(heading(EXPERIMENTS[name]))}) {EXPERIMENTS[name].title}"
        lines.append(f"| {link} | {' | '.join(counts)} | {runs[name].seconds:.0f} |")
    for verdict in VERDICTS[1:]:
        lines += ["", f"**{verdict.capitalize()}**", ""]
        lines += [
            f"- {name.upper()}: {escaped(one.claim.text)}"
            for name, claims in found.items()
            for one in claims
            if one.verdict == verdict
        ] or ["- nothing"]
    return "\n".join(lines) + "\n"


def section(experiment: Experiment, run: Run, found: Sequence[Judged]) -> str:
    seeds = list(run.seeds)
    said = f"\n{experiment.reading}\n" if tuple(seeds) == SEEDS else ""
    return f"""## {heading(experiment)}

{experiment.about.strip()}

{claims_table(found, seeds, experiment.digits)}
{said}
![{experiment.caption}]({experiment.name}.svg)

*{experiment.caption} {BANDS}*

Mean ± standard deviation over the seeds:

{points_table(experiment, list(run.seeds.values()))}
"""


def heading(experiment: Experiment) -> str:
    return f"{experiment.name.upper()}: {experiment.title}"


def anchor(text: str) -> str:
    """As GitHub makes it."""
    return "".join(c for c in text.lower() if c.isalnum() or c in " -_").replace(" ", "-")
