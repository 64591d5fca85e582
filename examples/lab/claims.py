"""What the support desk is said to show, as numbers of one seed each, and whether several seeds bear it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from .results import NotMeasured, Results

Verdict = Literal["holds", "not shown", "contradicted"]

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom → the t distribution's 97.5 % quantile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """On every seed ``value`` is above ``above``."""

    text: str
    value: Callable[[Results], float]
    """The number, from the results of one seed."""
    above: float


def oracle(results: Results, cell: str, step: int) -> float:
    return results.point(cell, step, "shop").oracle


def kl_ratio(one: str, other: str) -> Callable[[Results], float]:
    """ln (KL of ``one`` / KL of ``other``) on travel prompts at step 100: the preference pairs have none of these."""
    return lambda seed: math.log(seed.point(one, 100, "travel").kl / seed.point(other, 100, "travel").kl)


def ahead(one: str, other: str, step: int) -> Callable[[Results], float]:
    return lambda seed: oracle(seed, one, step) - oracle(seed, other, step)


def fluency(column: str) -> Callable[[Results], float]:
    return lambda seed: fmean(getattr(seed.point("reference", 0, family), column) for family in ("shop", "travel"))


def closeness(method: str, target: float) -> Callable[[Results], float]:
    """−|margin at step 80 − the finite optimum|, nats."""
    return lambda seed: -abs(seed.margin(method, 80) - target)


CDPO_OPTIMUM = math.log(0.9 / 0.1) / 0.5
IPO_OPTIMUM = 1 / (2 * 0.1)

CLAIMS: tuple[Claim, ...] = (
    Claim(text="initial model: grammatical replies", value=fluency("grammatical"), above=0.8),
    Claim(text="initial model: the right thing is named", value=fluency("right_thing"), above=0.97),
    Claim(text="initial model: replies that end", value=fluency("ended"), above=0.98),
    Claim(text="oracle at 50: wpo − dpo", value=ahead("wpo", "dpo", 50), above=0.0),
    Claim(text="oracle at 100: wpo − dpo", value=ahead("wpo", "dpo", 100), above=0.0),
    Claim(text="oracle at 50: wpo − wpo permuted", value=ahead("wpo", "wpo permuted", 50), above=0.0),
    Claim(text="oracle at 100: wpo − wpo permuted", value=ahead("wpo", "wpo permuted", 100), above=0.0),
    Claim(text="oracle at 100: (dpo + filter 0.7) − dpo", value=ahead("dpo + filter 0.7", "dpo", 100), above=0.0),
    Claim(text="oracle at 100: wpo − (dpo + filter 0.7)", value=ahead("wpo", "dpo + filter 0.7", 100), above=0.0),
    Claim(text="oracle at 50: dpo on-policy − dpo", value=ahead("dpo on-policy", "dpo", 50), above=0.0),
    Claim(text="oracle at 50: dpo once − dpo", value=ahead("dpo once", "dpo", 50), above=0.0),
    Claim(text="oracle at 50: dpo hybrid − dpo", value=ahead("dpo hybrid", "dpo", 50), above=0.0),
    Claim(text="oracle at 50: dpo on-policy − dpo once", value=ahead("dpo on-policy", "dpo once", 50), above=0.0),
    Claim(text="oracle at 50: dpo on-policy − dpo hybrid", value=ahead("dpo on-policy", "dpo hybrid", 50), above=0.0),
    Claim(text="oracle at 100: dpo on-policy − dpo", value=ahead("dpo on-policy", "dpo", 100), above=0.0),
    Claim(text="travel KL at 100: ln (dpo / mpo)", value=kl_ratio("dpo", "mpo"), above=math.log(3)),
    Claim(
        text="travel KL at 100: ln (dpo / dpo + sft term)", value=kl_ratio("dpo", "dpo + sft term"), above=math.log(2)
    ),
    Claim(text="travel KL at 100: ln (mpo alone / dpo)", value=kl_ratio("mpo alone", "dpo"), above=0.0),
    Claim(
        text="travel KL at 100: ln (mpo alone / dpo + sft term)",
        value=kl_ratio("mpo alone", "dpo + sft term"),
        above=math.log(3),
    ),
    Claim(text="fixed pairs: cdpo stops at 4.39", value=closeness("cdpo", CDPO_OPTIMUM), above=-0.15),
    Claim(text="fixed pairs: exo_pref stops at 4.39", value=closeness("exo_pref", CDPO_OPTIMUM), above=-0.15),
    Claim(text="fixed pairs: ipo stops at 5", value=closeness("ipo", IPO_OPTIMUM), above=-0.2),
    Claim(
        text="fixed pairs: dpo still grows from 40 to 80",
        value=lambda seed: seed.margin("dpo", 80) - seed.margin("dpo", 40),
        above=0.0,
    ),
    Claim(
        text="fixed pairs: mpo alone still grows from 40 to 80",
        value=lambda seed: seed.margin("mpo alone", 80) - seed.margin("mpo alone", 40),
        above=10.0,
    ),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t interval of the mean over seeds; everything, for a single one."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def verdict(values: Sequence[float], above: float) -> Verdict:
    """``holds`` on every seed and with the whole interval; ``contradicted`` when the interval lies below."""
    low, high = interval(values)
    if min(values) > above and low > above:
        return "holds"
    return "contradicted" if high < above else "not shown"


def claims_table(results: Results) -> str:
    """One Markdown row per claim that the results can speak of."""
    seeds = results.seeds
    lines = [
        f"| claim | above | {' | '.join(f'seed {seed}' for seed in seeds)} | mean [95 % over seeds] | |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for claim in CLAIMS:
        try:
            values = [claim.value(results.of(seed)) for seed in seeds]
        except NotMeasured:
            continue
        low, high = interval(values)
        numbers = " | ".join(f"{value:.3f}" for value in values)
        summary = f"{fmean(values):.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {claim.text} | {claim.above:.3f} | {numbers} | {summary} | {verdict(values, claim.above)} |")
    return "\n".join(lines)
