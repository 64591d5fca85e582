"""``results.json``: every estimate of the report, for programs.

::

    {"schema": "rayalign.results/2", "name": …, "title": …,
     "interval":  {"head", "unit": "prompt", "method", "level", "resamples", "seed"},
     "measures":  {"scores" | "kl" | "diagnostics" | "judge" (none or one):
                   [{"name", "label", "unit", "description"}, …]},
     "baseline":  what wins are counted against: "reference", or the label of what the points "(baseline)" are of,
     "prompt_sets": [{"name", "description", "num_prompts"}, …],
     "sampling":  {"seed", "temperature", "top_p", "max_new_tokens"},
     "cells":     [{"id", "label", "method", "display_name", "data_policy", "seed", "status", "reason",
                    "config_changes": [{"field", "base", "value"}, …],
                    "cost": {"tokens_trained", "tokens_generated", "labels_used", "scorer_calls"},
                    "filter": {"policy_logp_quantile", "threshold", "kept", "of", "unit"} | null}, …],
     "points":    [{"cell" (an id, "reference" or "(baseline)"), "prompt_set", "step", "num_samples",
                    "scores" | "changes" | "win_rates" | "kl" | "diagnostics": {name: ESTIMATE, …},
                    "judged": ESTIMATE (the judge's win rate) | null (no judge),
                    "length": ESTIMATE, "cut": ESTIMATE, "on_front": [scorer, …]}, …],
     "at_kl":     [{"cell", "prompt_set", "level",
                    "crossings": {scorer: {"score", "from_step", "to_step"} | null (not reached)}}, …],
     "answers":   [{"cell", "role" ("scorer", "diagnostic" or "judge"), "name", "replies", "missing", "problem" (why the
                    first is missing), "calls", "failures", "ties", "disagreements"}, …],
     "best_of_n": [{"prompt_set", "n", "kl_bound", "scores": {name: ESTIMATE, …}}, …]  (of the reference),
     "times":     {"started", "finished", "device_seconds": {cell id: seconds}},
     "provenance": {"commands", "git_revision", "versions", "config_digests", "seeds", "machine"}}

ESTIMATE is ``{"mean", "low", "high", "n"}`` over n prompts; a missing number is null. Numbers carry six significant
digits. Everything but ``times`` and ``provenance`` is a function of the measurements alone.

Version 2 added ``baseline``, ``answers``, ``points[].judged``, ``measures.judge`` and the points of a baseline; what
version 1 had, means what it meant.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rayalign.report.points import REFERENCE, Comparison
from rayalign.report.statistics import INTERVAL_HEAD
from rayalign.report.summary import Summary

SCHEMA = "rayalign.results/2"


def results_json(comparison: Comparison, summary: Summary) -> str:
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
            "head": INTERVAL_HEAD,
            "unit": "prompt",
            "method": "percentile bootstrap",
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
        "points": [asdict(point) for point in summary.points],
        "at_kl": [asdict(row) for row in summary.at_kl],
        "answers": [asdict(row) for row in summary.answers],
        "best_of_n": [asdict(row) for row in summary.best_of_n],
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
