"""A made-up comparison of twelve cells, shaped like a real one: three data policies, a skip and a failure."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayalign.report.points import Comparison

GRID = (
    ("dpo", "off_policy", 6.8, 0.16),
    ("dpo", "hybrid", 6.6, 0.25),
    ("dpo", "on_policy", 7.2, 0.28),
    ("dpo + wpo weights", "off_policy", 6.2, 0.24),
    ("dpo + wpo weights", "hybrid", 6.0, 0.27),
    ("ipo", "off_policy", 3.8, 0.19),
    ("exo", "off_policy", 14.2, 0.13),
    ("simpo", "off_policy", 8.2, 0.16),
    ("mpo (no KL)", "off_policy", 39.0, 0.09),
    ("rloo", "on_policy", 2.4, 0.23),
)
STEPS = (20, 50, 100)
REPLY = "dear customer , we will exchange the kettle today . we are very glad to serve you . kind regards ."
PROMPT = (
    "hello , i bought a blue kettle from your outlet last month . it came in the wrong colour . please help ({index})"
)


def point(
    rng: np.random.Generator, *, prompt_set: str, step: int, kl: float, gain: float, shape: tuple[int, int], who: str
) -> dict[str, Any]:
    oracle = np.clip(0.56 + gain + rng.normal(0, 0.15, shape), 0, 1)
    audit = np.clip(oracle - 0.02 - 0.02 * kl + rng.normal(0, 0.08, shape), 0, 1)
    return {
        "prompt_set": prompt_set,
        "step": step,
        "scores": {"oracle": oracle.tolist(), "audit2": audit.tolist()},
        "kl": {"k1": rng.normal(kl, 1 + kl / 2 if kl else 0, shape).tolist(), "k1_rb": np.full(shape, kl).tolist()},
        "length": np.minimum(72, rng.poisson(32 + 60 * gain, shape)).tolist(),
        "finished": (rng.random(shape) > 0.01).tolist(),
        "diagnostics": {"no_valid_opening": (rng.random(shape) < kl / 60).tolist()},
        "replies": [{"prompt": index, "sample": 0, "text": f"{REPLY} ({who})"} for index in range(3)],
    }


def comparison_input(num_prompts: int = 24, num_samples: int = 2, seed: int = 0) -> dict[str, Any]:
    """What a pipeline would pass to ``Comparison``; change it in a test, then validate."""
    rng = np.random.default_rng(seed)
    shape = (num_prompts, num_samples)
    sets = ("shop", "travel")
    cells: list[dict[str, Any]] = []
    for method, policy, kl, gain in GRID:
        cell_id = f"{method}-{policy}".replace(" ", "_")
        points = [
            point(rng, prompt_set=name, step=step, kl=kl * share, gain=gain * share**0.4, shape=shape, who=cell_id)
            for name in sets
            for step, share in zip(STEPS, (0.2, 0.6, 1.0), strict=True)
        ]
        metrics = [
            {
                "step": step,
                "loss": 0.69 - 0.3 * gain * np.sqrt(step) / 3 + rng.normal(0, 0.02),
                "rewards/accuracies": float(np.clip(0.5 + gain * step / 100 + rng.normal(0, 0.1), 0, 1)),
                "rewards/margins": kl * step / 200 + rng.normal(0, 0.2),
            }
            for step in range(1, 101)
        ]
        cells.append(
            {
                "id": cell_id,
                "label": f"{method}, {policy.replace('_policy', '')}",
                "method": method.split()[0],
                "display_name": method,
                "data_policy": policy,
                "seed": 0,
                "status": "done",
                "config_changes": [
                    {"field": "method.name", "base": "dpo", "value": method},
                    {"field": "data_policy.name", "base": "off_policy", "value": policy},
                ],
                "cost": {
                    "tokens_trained": 310_000,
                    "tokens_generated": 0 if policy == "off_policy" else 105_000,
                    "labels_used": 1600,
                    "scorer_calls": 0 if policy == "off_policy" else 3200,
                    "device_seconds": 24.5,
                },
                "points": points,
                "metrics": metrics,
            }
        )
    failed = {
        **cells[7],
        "id": "orpo",
        "label": "orpo, off",
        "display_name": "orpo",
        "method": "orpo",
        "status": "failed",
    }
    early = point(rng, prompt_set="shop", step=20, kl=0.5, gain=0.05, shape=shape, who="orpo")
    failed |= {"reason": "the loss became NaN at step 61: lower optim.lr", "points": [early], "metrics": []}
    skipped = {
        **cells[0],
        "id": "ppo",
        "label": "ppo, off",
        "display_name": "ppo",
        "method": "ppo",
        "status": "skipped",
    }
    skipped |= {"reason": "stored groups carry no behavior log-probs, which ppo needs", "points": [], "metrics": []}
    return {
        "name": "quickstart",
        "text": {
            "title": "The support desk: one loss, three data policies",
            "opening": [
                "This world was built so that most stored pairs teach a lesson that is wrong for most prompts.",
                "It shows behaviour and does not rank: one seed, one setting per method, interval over prompts only.",
            ],
            "caveats": ["Recipes were adjusted on seed 0 only, not searched."],
        },
        "scorers": [
            {"name": "oracle", "label": "oracle", "description": "What every method is trained on, in [0, 1]."},
            {"name": "audit2", "label": "audit2", "description": "Never trained on: notices padding and repetition."},
        ],
        "kl_estimators": [
            {"name": "k1", "label": "k1", "description": "Mean of log π − log π_ref over the policy's own replies."},
            {
                "name": "k1_rb",
                "label": "k1, Rao–Blackwellised",
                "description": "Exact per token, averaged over replies.",
            },
        ],
        "diagnostics": [{"name": "no_valid_opening", "label": "no valid opening", "unit": "share"}],
        "prompt_sets": [
            {"name": name, "description": text, "prompts": [PROMPT.format(index=i) for i in range(num_prompts)]}
            for name, text in zip(
                sets, ("in the preference data", "held out: never in the preference data"), strict=True
            )
        ],
        "sampling": {"seed": 7, "temperature": 1.0, "max_new_tokens": 72},
        "reference": [
            point(rng, prompt_set=name, step=0, kl=0.0, gain=0.0, shape=shape, who="reference") for name in sets
        ],
        "cells": [*cells, failed, skipped],
        "provenance": {
            "commands": ["rayalign compare examples/quickstart.yaml"],
            "git_revision": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"rayalign": "0.1.0", "torch": "2.13.0"},
            "seeds": {"run": 0},
            "machine": {"CPU": "2 cores"},
            "config_digests": {"compare": "9f2c" * 16},
            "started": "2026-01-01T10:00:00+00:00",
            "finished": "2026-01-01T10:04:10+00:00",
        },
    }


def few_cells(num_prompts: int = 4, num_samples: int = 2) -> dict[str, Any]:
    """The same with four cells: off-policy, on-policy, failed, skipped."""
    given = comparison_input(num_prompts, num_samples)
    given["cells"] = [given["cells"][index] for index in (0, 2, -2, -1)]
    return given


def seeded(given: dict[str, Any], seeds: int = 3) -> dict[str, Any]:
    """The same with every cell trained with ``seeds`` seeds, each with points of its own."""
    shape = np.shape(given["reference"][0]["length"])
    gains = {f"{method}-{policy}".replace(" ", "_"): (kl, gain) for method, policy, kl, gain in GRID}
    cells = []
    for cell in given["cells"]:
        kl, gain = gains.get(cell["id"], (8.2, 0.16))
        for seed in range(seeds):
            rng = np.random.default_rng([seed, len(cells)])
            points = [
                point(rng, prompt_set=old["prompt_set"], step=old["step"], kl=kl * old["step"] / 100,
                      gain=gain * old["step"] / 100, shape=(shape[0], shape[1]), who=f"{cell['id']} {seed}")
                for old in cell["points"]
            ]  # fmt: skip
            cells.append(
                cell
                | {"id": f"{cell['id']}__seed-{seed}", "label": f"{cell['label']}, seed={seed}", "seed": seed}
                | {"points": points, "entry": cell["label"] if cell["status"] != "skipped" else ""}
            )
    return given | {"cells": cells}


def judged(given: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """The same with a judge, whose verdicts lack the first one of every point but the reference's."""
    rng = np.random.default_rng(seed)
    given["judge"] = {"name": "careful", "label": "careful", "description": "Sees both replies in both orders."}
    for point in given["reference"]:
        point["verdicts"] = np.full_like(point["length"], 0.5, dtype=float).tolist()
    for point in (point for cell in given["cells"] for point in cell["points"]):
        verdicts = rng.choice([0.0, 0.5, 1.0], size=np.shape(point["length"])).tolist()
        verdicts[0][0] = None
        counts = {"calls": 2 * np.size(verdicts) + 6, "failures": 8, "ties": 2, "disagreements": 1, "missing": 1}
        reason = "careful at http://here gave no verdict in 4 attempts"
        asked = {"role": "judge", "name": "careful", "replies": int(np.size(verdicts)), "problem": reason, **counts}
        point |= {"verdicts": verdicts, "answers": [asked]}
    return given


def against_another(given: dict[str, Any]) -> dict[str, Any]:
    """The same with wins counted against a policy that is neither the reference nor a cell."""
    rng = np.random.default_rng(2)
    shape = np.shape(given["reference"][0]["length"])
    points = [
        point(rng, prompt_set=name, step=0, kl=3.0, gain=0.1, shape=(shape[0], shape[1]), who="last year's")
        for name in ("shop", "travel")
    ]
    given["baseline"] = {"label": "last year's", "points": points}
    return given


def make_comparison(**sizes: int) -> Comparison:
    return Comparison.model_validate(comparison_input(**sizes))
