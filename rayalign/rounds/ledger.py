"""What drawing cost and gave, and what is said where it gave too little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rayalign.data.tokenize_rows import Shape
from rayalign.engine.batches import Weights
from rayalign.rounds.chunk import prompt_failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What drawing cost and gave; sums over chunks."""

    prompts: int
    completions: int
    tokens_generated: int
    finished: int
    scorer_calls: int
    labels: int
    distinguishing: int
    rewards: tuple[float, float] | None
    quarantined: int
    reward_sum: float
    seconds_generating: float
    """Sum over all actors, as the others."""
    seconds_starting: float
    refreshes: int
    seconds_refreshing: float

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]]) -> Ledger:
        own = ("quarantined", "rewards")
        sums = {}
        for name in cls.__slots__:
            if name not in own:
                sums[name] = sum(report[name] for report in reports)
        bounds = [report["rewards"] for report in reports if report["rewards"] is not None]
        return cls(
            **sums,
            quarantined=sum(len(report["quarantined"]) for report in reports),
            rewards=(min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None,
        )

    def teaches(self, *, alone: bool) -> bool:
        """Whether a method learns anything from these completions.

        Where one completion of a prompt is enough (``alone``), rewards may differ from prompt to prompt.
        """
        if alone:
            return self.rewards is not None and (self.completions < 2 or self.rewards[0] < self.rewards[1])
        return self.distinguishing > 0

    def facts(self, weights: Weights | None = None) -> dict[str, float]:
        """Means over the round, for the rows of metrics; ``weights`` are those that it was drawn with."""
        drawn = max(1, self.completions)
        facts = {
            "rollout/reward": self.reward_sum / max(1, self.completions or self.scorer_calls),
            "rollout/length": self.tokens_generated / drawn,
            "rollout/finished": self.finished / drawn,
            "rollout/labelled": self.labels / max(1, self.prompts),
            "rollout/labels": self.labels,
            "rollout/scorer_calls": self.scorer_calls,
            "rollout/tokens": self.tokens_generated,
            "rollout/seconds_generating": self.seconds_generating,
        }
        if weights is not None and self.refreshes:
            seconds = weights.seconds_sending + self.seconds_refreshing / self.refreshes
            facts |= {
                "refresh/seconds": seconds,
                "refresh/bytes": weights.num_bytes,
                "refresh/bytes_per_second": weights.num_bytes / seconds,
            }
        return facts


WHAT_DISTINGUISHES = "more rollout.samples, a higher rollout.temperature, a finer scorer or another label rule"


def nothing_learned(ledgers: Sequence[Ledger], *, scorer: str, rule: str, shape: Shape) -> str:
    """Why completions that ``scorer`` scored and ``rule`` labelled teach nothing."""
    bounds = [ledger.rewards for ledger in ledgers if ledger.rewards is not None]
    low, high = min((low for low, _ in bounds), default=0.0), max((high for _, high in bounds), default=0.0)
    given = f"every completion {low:g}" if low == high else f"{low:g} to {high:g}"
    why = f"label {rule} found no preference"
    if shape in ("group", "one"):
        why = "the completions of each prompt are worth the same"
    return f"no prompt is labelled: scorer {scorer} gave {given if bounds else 'no reward'}, and {why}"


def bad_prompts(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(chain.from_iterable(report["quarantined"] for report in reports))


def bad_prompts_sentence(reports: Sequence[dict[str, Any]], more: str = "") -> str:
    """How many prompts the scorer failed on, and the first of them; ``more`` stands between the two."""
    failures, prompts = bad_prompts(reports), sum(report["prompts"] for report in reports)
    return f"{len(failures)} of {prompts} prompts have no scored completions{more}; first {prompt_failure(failures[0])}"
