"""What runs say to Ray's metrics, from where its dashboard, Prometheus and Grafana take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

GAUGES = {
    "step": ("Steps done", ("step",)),
    "loss": ("Of the newest step", ("loss",)),
    "reward": ("Mean over the newest step, or over its round", ("reward", "rollout/reward")),
    "kl": ("KL(policy, reference), nats per token", ("kl/ref_k3", "kl/ref_k1")),
    "margin": ("Reward of the chosen minus the rejected", ("rewards/margins",)),
}
"""Name, with ``rayalign_`` before it → description, and the keys of a row in order of preference."""


class Gauges:
    """Gauges tagged by run; those of this process end with it. Needs a connection to Ray."""

    def __init__(self) -> None:
        about = {name: text for name, (text, _) in GAUGES.items()} | {"tokens_per_second": "Of the newest step"}
        self.gauges = {name: Gauge(f"rayalign_{name}", text, tag_keys=("run",)) for name, text in about.items()}

    def set(self, run: str, row: Mapping[str, Any]) -> None:
        """Take over a row of ``metrics.jsonl``; what it does not have stays as it was."""
        for name, value in gauge_values(row).items():
            self.gauges[name].set(value, tags={"run": run})


def gauge_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Gauge → value, for those that a row has a number for."""
    found = {}
    for name, (_, keys) in GAUGES.items():
        numbers = [row[key] for key in keys if row.get(key) is not None]
        if numbers:
            found[name] = float(numbers[0])
    if row.get("step_tokens") and row.get("seconds"):
        found["tokens_per_second"] = row["step_tokens"] / row["seconds"]
    return found
