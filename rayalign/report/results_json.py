"""``results.json``: every estimate of the report, for programs.

::

    {"schema": "rayalign.results/4", "name": …, "title": …,
     "interval":  {"head", "unit": "prompt" | "training seed and prompt", "method", "level", "resamples", "seed"},
     "measures":  {"scores" | "kl" | "diagnostics" | "judge" (none or one):
                   [{"name", "label", "unit", "description"}, …]},
     "baseline":  what wins are counted against: "reference", or the label of what the points "(baseline)" are of,
     "prompt_sets": [{"name", "description", "num_prompts"}, …],
     "sampling":  {"seed", "temperature", "top_p", "max_new_tokens"},
     "cells":     [{"id", "label", "method", "display_name", "data_policy", "seed", "entry" (or ""),
                    "status" ("done", "failed", "skipped" or "stopped": by the budget, and measured as far as it came),
                    "reason", "config_changes": [{"field", "base", "value"}, …],
                    "cost": {"tokens_trained", "tokens_generated", "labels_used", "scorer_calls"},
                    "filter": {"policy_logp_quantile", "threshold", "kept", "of", "unit"} | null}, …],
     "entries":   [{"id", "label", "cells": [id, …]}, …]  (cells that differ in their seed only are one entry),
     "tuning":    [{"label", "cells": [id, …], "asked" (trials), "seeds", "scorer", "prompt_set", "num_prompts" (of the
                    select half), "max_kl" | null, "picked": place in "trials" | null (nothing),
                    "trials": [{"label", "values": {setting: text}, "status" ("done" or "failed"), "reason" (of a
                      failure, or against being picked), "step", "score" and "kl" (means, or null), "cost"}, …],
                    "left_out": [{"what", "reason"}, …]}, …]  (empty: untuned),
     "points":    [{"cell" (an id, "reference" or "(baseline)"), "prompt_set", "step", "num_samples",
                    "num_seeds" (measured here), "of_seeds",
                    "scores" | "changes" | "win_rates" | "lc_win_rates" | "kl" | "kl_per_token" | "diagnostics":
                    {name: ESTIMATE, …},
                    "judged" | "lc_judged": ESTIMATE (the judge's win rate) | null (no judge),
                    "length": ESTIMATE, "cut": ESTIMATE, "on_front": [scorer, …],
                    "front_frequency": {scorer: share of resamples}}, …],
     "entry_points": the same with an entry's id as "cell",
     "differences": [{"entry", "other", "scorer", "steps": [_, _], "seeds": [_, _],
                    "found": {"mean", "low", "high", "standard_error", "degrees_of_freedom", "p"},
                    "adjusted_p" (Holm, over the list), "detectable", "better": an entry's id or ""}, …],
     "at_kl":     [{"cell", "prompt_set", "level",
                    "crossings": {scorer: {"score", "from_step", "to_step"} | null (not reached)}}, …],
     "entries_at_kl": [{"entry", "prompt_set", "level",
                    "crossings": {scorer: {"reached", "seeds", "score" (mean), "low", "high" (a range)}}}, …],
     "chosen":    [{"entry", "prompt_set", "step" (highest on the select half), "num_seeds", "num_select", "num_report",
                    "scores" | "changes": {name: ESTIMATE, …}, "kl": ESTIMATE}, …]  (of the report half),
     "answers":   [{"cell", "role" ("scorer", "diagnostic" or "judge"), "name", "replies", "missing", "problem" (why the
                    first is missing), "calls", "failures", "ties", "disagreements"}, …],
     "contests":  [{"row", "column" (entries' ids or "reference"), "scorer", "wins": ESTIMATE (of the row;
                    without interval where seeds are several)}, …]  (last steps, first prompt set),
     "best_of_n": [{"prompt_set", "n", "kl_bound", "scores": {name: ESTIMATE, …}}, …]  (of the reference),
     "measured":  {what: digest} ("reference", "prompts", "scorers" …; reports merge where all are equal),
     "parts":     [{"name", "cells": [id, …]}, …]  (of a merged report),
     "left_out":  [{"what", "reason"}, …]  (comparisons that could not be merged),
     "times":     {"started", "finished", "device_seconds": {cell id: seconds}},
     "provenance": {"commands", "git_revision", "versions", "config_digests", "seeds", "machine"}}

ESTIMATE is ``{"mean", "low", "high", "n"}`` over n prompts and, where ``num_seeds`` > 1, seeds; a missing number is
null. Numbers carry six significant digits. Everything but ``times`` and ``provenance`` is a function of the
measurements alone.

Version 4 added ``tuning``, ``contests``, ``measured``, ``parts`` and ``left_out``; everything else is as in version
3. Version 3 added ``entries``, ``entry_points``, ``differences``, ``entries_at_kl``, ``chosen`` and a cell's ``entry``.
A point got ``num_seeds``, ``of_seeds``, ``lc_win_rates``, ``lc_judged``, ``kl_per_token`` and ``front_frequency``. The
first KL estimator is ``kl_rb`` now, and fronts and ``at_kl`` use it. ``points`` are of single runs, as before. Version
2 added ``baseline``, ``answers``, ``points[].judged``, ``measures.judge`` and the points of a baseline; what version 1
had, means what it meant.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rayalign.report.points import REFERENCE, ComparisonRecord
from rayalign.report.summary import Summary

SCHEMA = "rayalign.results/4"


def results_json(comparison: ComparisonRecord, summary: Summary) -> str:
    """The text of ``results.json``; equal input gives equal bytes."""
    provenance = comparison.provenance.model_dump()
    times = {
        "started": provenance.pop("started"),
        "finished": provenance.pop("finished"),
        "device_seconds": {cell.id: cell.cost.device_seconds for cell in comparison.cells},
    }
    document = {
        "schema": SCHEMA,
        "name": comparison.name,
        "title": comparison.text.title,
        "interval": {
            "head": summary.interval_head,
            "unit": "training seed and prompt" if summary.replicated else "prompt",
            "method": "two-level bootstrap, Student's t" if summary.replicated else "percentile bootstrap",
            **asdict(summary.bootstrap),
        },
        "measures": {
            "scores": [measure.model_dump() for measure in comparison.scorers],
            "kl": [measure.model_dump() for measure in comparison.kl_estimators],
            "diagnostics": [measure.model_dump() for measure in comparison.diagnostics],
            "judge": [comparison.judge.model_dump()] if comparison.judge else [],
        },
        "baseline": comparison.baseline.label if comparison.baseline else REFERENCE,
        "prompt_sets": [
            {"name": prompts.name, "description": prompts.description, "num_prompts": len(prompts.prompts)}
            for prompts in comparison.prompt_sets
        ],
        "sampling": comparison.sampling.model_dump(),
        "cells": [
            cell.model_dump(exclude={"points": True, "metrics": True, "cost": {"device_seconds": True}})
            for cell in comparison.cells
        ],
        "entries": [{"id": entry.id, "label": entry.label, "cells": list(entry.cell_ids)} for entry in summary.entries],
        "tuning": [
            tuning.model_dump(exclude={"trials": {"__all__": {"cost": {"device_seconds"}}}})
            for tuning in comparison.tuning
        ],
        "points": [asdict(point) for point in summary.points],
        "entry_points": [asdict(point) for point in summary.entry_points],
        "differences": [asdict(row) for row in summary.differences],
        "at_kl": [asdict(row) for row in summary.at_kl],
        "entries_at_kl": [asdict(row) for row in summary.entries_at_kl],
        "chosen": [asdict(row) for row in summary.chosen],
        "answers": [asdict(row) for row in summary.answers],
        "contests": [asdict(row) for row in summary.contests],
        "best_of_n": [asdict(row) for row in summary.best_of_n],
        "measured": dict(comparison.measured),
        "parts": [part.model_dump() for part in comparison.parts],
        "left_out": [left.model_dump() for left in comparison.left_out],
        "times": times,
        "provenance": provenance,
    }
    return json.dumps(_plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Six significant digits, null for NaN, everywhere."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
