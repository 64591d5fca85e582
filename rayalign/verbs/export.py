"""``rayalign export alpaca_eval``: the replies of an evaluated run. Reads folders; starts no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayalign.comparison.evaluation_spec import KEPT
from rayalign.errors import UserError
from rayalign.storage.place import Place, listed

Row = dict[str, Any]
ALPACA_EVAL = ("instruction", "output", "generator", "dataset")
"""Fields of a model's outputs as AlpacaEval 0.6 reads them; ``dataset`` names the part of a prompt set."""


def alpaca_eval(
    directory: Place, out: Path, *, step: int | None, prompts: str | None, sample: int, generator: str | None
) -> int:
    """Write an evaluated run's replies as AlpacaEval's ``model_outputs``; returns how many.

    Raises:
        UserError: the folder holds no evaluation with replies, or not that step, prompt set or sample.
    """
    found = evaluations(directory)
    if step is None:
        step = max(found)
    if step not in found:
        raise UserError(f"{directory}: step {step} was not evaluated; there are {', '.join(map(str, sorted(found)))}")
    texts = json.loads(found[step].read_text(encoding="utf-8")).get(KEPT)
    if not texts:
        raise UserError(
            f"{found[step]} was written by an older version, without the replies; measure again: remove "
            f"{found[step].parent}, then repeat rayalign evaluate or rayalign compare"
        )
    name = next(iter(texts)) if prompts is None else prompts
    if name not in texts:
        raise UserError(f"{directory}: no prompt set is called {name}; there are {', '.join(texts)}")
    replies = texts[name]["replies"]
    if not 0 <= sample < len(replies[0]):
        raise UserError(f"{directory}: sample {sample} was not drawn; there are 0 to {len(replies[0]) - 1}")
    who = generator or f"{(directory.resolve() if isinstance(directory, Path) else directory).name}-step-{step}"
    rows = [
        dict(zip(ALPACA_EVAL, (prompt, row[sample], who, name), strict=True))
        for prompt, row in zip(texts[name]["prompts"], replies, strict=True)
    ]
    write_output(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return len(rows)


def evaluations(directory: Place) -> dict[int, Place]:
    """Step → file of a run's measured checkpoints; raises UserError where there are none."""
    files = listed(directory / "evaluation", "step_*.json")
    if not files:
        known = [path.parent.parent.name for path in listed(directory, "cells/*/evaluation/step_*.json")]
        hint = f"; name one of its cells: {directory}/cells/{known[0]}" if known else ""
        raise UserError(
            f"{directory} holds no evaluation"
            f"{hint or ': measure a trained run with rayalign evaluate, or a grid of them with rayalign compare'}"
        )
    return {int(path.stem.removeprefix("step_")): path for path in files}


def write_output(out: Path, text: str) -> None:
    """The whole file or none; raises UserError where it cannot be written."""
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
