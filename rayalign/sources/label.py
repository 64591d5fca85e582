"""Scores of one prompt's candidates → which of them are trained on, and as what. Functions of numbers and a key."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayalign.data.prepare import Shape
from rayalign.data.rank import places
from rayalign.errors import UserError
from rayalign.imports import load_function
from rayalign.rollout.noise import sample_key, uniforms

Pair = tuple[int, int]
"""(chosen, rejected), indices of candidates."""

LABEL_STREAM = -1
"""Stands where noise is keyed by a sample's index: a label's draw is none of the samples'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSpec:
    """How scores become preferences; see :class:`rayalign.config.policy.LabelConfig` for every field."""

    name: str = "best_worst"
    scale: float = 1.0
    threshold: float = 5.0
    gap: float = 1.0
    rejected: Literal["random", "minimum"] = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The candidates of one prompt as a rule sees them."""

    scores: Sequence[float]
    lengths: Sequence[int]
    """Tokens of every candidate: ties are broken by them."""
    noise: Sequence[float]
    """Three uniform numbers that are fixed by seed and position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """What is kept of one prompt's candidates."""

    kept: tuple[int, ...]
    """Indices of candidates, in order; for a pair (chosen, rejected)."""
    label: float = math.nan
    """1 desirable, 0 undesirable, for methods of single labelled examples."""
    rank: tuple[float, ...] = ()
    """Places of the kept candidates, for methods of rankings."""
    preferred: bool = True
    """False where the rule found no preference: a lone candidate is kept, which no pairwise loss counts."""


def label(scores: Sequence[float], lengths: Sequence[int], spec: LabelSpec, *, shape: Shape, key: int) -> Labelled:
    """What a method of ``shape`` learns from K scored candidates; ``key`` fixes whatever is drawn.

    Groups keep every candidate (``rewards``), single completions the best one (``best``: best-of-K sampling); only
    pairs and labelled examples ask the rule.

    Raises:
        UserError: the user's own rule answers neither None nor two different candidates.
    """
    scored = Scored(scores=scores, lengths=lengths, noise=[float(value) for value in uniforms(key, 3)])
    if shape == "group":
        return Labelled(kept=tuple(range(len(scores))))
    if shape == "one":
        return Labelled(kept=(best(scored),))
    if shape == "ranking" and spec.name == "rewards":
        if min(scores) == max(scores):
            return Labelled(kept=(0,), preferred=False)
        return Labelled(kept=tuple(range(len(scores))), rank=tuple(places(scores).tolist()))
    pair = rule(spec)(scored)
    if pair is None:
        return Labelled(kept=(0,), preferred=False)
    if shape == "labelled":  # one example per prompt, so that a step has as many as it says
        side = int(scored.noise[2] < 0.5)
        return Labelled(kept=(pair[side],), label=1.0 - side)
    return Labelled(kept=pair, rank=(0.0, 1.0) if shape == "ranking" else ())


def label_key(seed: int, position: int) -> int:
    """The key of a prompt's label."""
    return sample_key(seed, position, LABEL_STREAM)


def rule(spec: LabelSpec) -> Callable[[Scored], Pair | None]:
    """The rule called ``spec.name``; ``module:function`` is the user's own, of the list of scores."""
    if spec.name == "best_worst":
        return best_worst
    if spec.name == "wpo":
        return lambda scored: wpo(scored, threshold=spec.threshold, gap=spec.gap, rejected=spec.rejected)
    if spec.name == "bradley_terry":
        return lambda scored: bradley_terry(scored, scale=spec.scale)
    return own_rule(spec.name)


def best(scored: Scored) -> int:
    """The highest score, of equal ones the shortest, of equally long ones the first."""
    return min(range(len(scored.scores)), key=lambda k: (-scored.scores[k], scored.lengths[k], k))


def best_worst(scored: Scored) -> Pair | None:
    """Highest against lowest score; no preference where all are equal.

    Ties: the shortest chosen, and the rejected one that is nearest to it in length, so that length teaches nothing.
    """
    chosen = best(scored)
    lowest = min(scored.scores)
    if lowest == scored.scores[chosen]:
        return None
    return chosen, nearest_in_length(scored, chosen, [k for k, score in enumerate(scored.scores) if score == lowest])


def wpo(scored: Scored, *, threshold: float, gap: float, rejected: Literal["random", "minimum"]) -> Pair | None:
    """WPO's recipe for mixed candidates (2406.11827, §4.1).

    Chosen: the best one, if it scores at least ``threshold``. Rejected: one that scores at least ``gap`` less, at
    random as in the paper, or the lowest as in the authors' second data set. Else the prompt has no pair.
    """
    chosen = best(scored)
    lower = [k for k, score in enumerate(scored.scores) if score <= scored.scores[chosen] - gap]
    if scored.scores[chosen] < threshold or not lower:
        return None
    if rejected == "random":
        return chosen, lower[int(scored.noise[0] * len(lower))]
    lowest = min(scored.scores[k] for k in lower)
    return chosen, nearest_in_length(scored, chosen, [k for k in lower if scored.scores[k] == lowest])


def bradley_terry(scored: Scored, *, scale: float) -> Pair | None:
    """Two candidates at random and one draw of P(i ≻ j) = σ((score_i − score_j) / scale): a noisy labeller."""
    count = len(scored.scores)
    if count < 2:
        return None
    first = int(scored.noise[0] * count)
    second = (first + 1 + int(scored.noise[1] * (count - 1))) % count
    preferred = 1.0 / (1.0 + math.exp(-min(700.0, max(-700.0, (scored.scores[first] - scored.scores[second]) / scale))))
    return (first, second) if scored.noise[2] < preferred else (second, first)


def own_rule(name: str) -> Callable[[Scored], Pair | None]:
    """``function(scores) → (chosen, rejected)``; None or NaN for no preference.

    Numbers of numpy and torch are numbers. Raises UserError for any other answer, and for what the function raises.
    """
    function = load_function(name, [0.0, 1.0])

    def apply(scored: Scored) -> Pair | None:
        count = len(scored.scores)
        try:
            answer = function(list(scored.scores))
        except Exception as error:  # the user's function may raise anything
            raise UserError(
                f"label.name: {name!r} raised {type(error).__name__}: {error} for the scores {list(scored.scores)}"
            ) from error
        if answer is None or _is_nan(answer):
            return None
        try:
            chosen, rejected = map(operator.index, answer)
        except (TypeError, ValueError):
            chosen = rejected = -1
        if chosen == rejected or not (0 <= chosen < count and 0 <= rejected < count):
            raise UserError(
                f"label.name: {name!r} returned {answer!r} for {count} scores: it must return (chosen, rejected), "
                "two different positions in the list, or None"
            )
        return chosen, rejected

    return apply


def _is_nan(answer: Any) -> bool:
    """Whether an answer is a number that is none."""
    try:
        return math.isnan(answer)
    except (TypeError, ValueError, RuntimeError):  # a pair, in whatever form
        return False


def nearest_in_length(scored: Scored, chosen: int, among: Sequence[int]) -> int:
    return min(among, key=lambda k: (abs(scored.lengths[k] - scored.lengths[chosen]), k))
