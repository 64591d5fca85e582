"""Scores of one prompt's candidates → which of them are trained on, and as what. Functions of numbers and a key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, TypeGuard

from rayalign.config.policy import LabelConfig
from rayalign.data.rank import places_of_scores
from rayalign.data.tokenize_rows import Shape
from rayalign.errors import UserError
from rayalign.rollout.sampling import sample_key, uniforms
from rayalign.user_function import CallFailed, UserFunction

Pair = tuple[int, int]
"""(chosen, rejected), indices of candidates."""

RULE_SECONDS = 60.0
"""Limit of one call of a rule of the user's own."""
LABEL_STREAM = -1
"""Stands where noise is keyed by a sample's index: a label's draw is none of the samples'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCandidates:
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


Rule: TypeAlias = Callable[[ScoredCandidates], Pair | None]
"""Which candidates become a pair, if any do."""


def label(
    scores: Sequence[float],
    lengths: Sequence[int],
    config: LabelConfig,
    *,
    shape: Shape,
    key: int,
    own: OwnRule | None = None,
) -> Labelled:
    """What a method of ``shape`` learns from K scored candidates; ``key`` fixes whatever is drawn.

    Groups keep every candidate (``rewards``), single completions the best one (``best``: best-of-K sampling); only
    pairs and labelled examples ask the rule: ``own``, where it was made of ``config`` before.

    Raises:
        UserError: the user's own rule fails, or answers neither None nor two different candidates.
    """
    scored = ScoredCandidates(scores=scores, lengths=lengths, noise=[float(value) for value in uniforms(key, 3)])
    if shape == "group":
        return Labelled(kept=tuple(range(len(scores))))
    if shape == "one":
        return Labelled(kept=(best(scored),))
    if shape == "ranking" and config.name == "rewards":
        if min(scores) == max(scores):
            return Labelled(kept=(0,), preferred=False)
        return Labelled(kept=tuple(range(len(scores))), rank=tuple(places_of_scores(scores).tolist()))
    pair = (own or make_rule(config))(scored)
    if pair is None:
        return Labelled(kept=(0,), preferred=False)
    if shape == "labelled":  # one example per prompt, so that a step has as many as it says
        side = int(scored.noise[2] < 0.5)
        return Labelled(kept=(pair[side],), label=1.0 - side)
    return Labelled(kept=pair, rank=(0.0, 1.0) if shape == "ranking" else ())


def label_key(seed: int, position: int) -> int:
    """The key of a prompt's label."""
    return sample_key(seed, position, LABEL_STREAM)


def make_rule(config: LabelConfig) -> Rule:
    """The rule called ``config.name``; ``module:function`` is the user's own, of the list of scores."""
    return RULES[config.name](config) if config.name in RULES else OwnRule(config.name)


def best(scored: ScoredCandidates) -> int:
    """The highest score, of equal ones the shortest, of equally long ones the first."""
    return min(range(len(scored.scores)), key=lambda k: (-scored.scores[k], scored.lengths[k], k))


def best_worst(scored: ScoredCandidates) -> Pair | None:
    """Highest against lowest score; no preference where all are equal.

    Ties: the shortest chosen, and the rejected one that is nearest to it in length, so that length teaches nothing.
    """
    chosen = best(scored)
    lowest = min(scored.scores)
    if lowest == scored.scores[chosen]:
        return None
    return chosen, nearest_in_length(scored, chosen, [k for k, score in enumerate(scored.scores) if score == lowest])


def wpo(
    scored: ScoredCandidates, *, threshold: float, gap: float, rejected: Literal["random", "minimum"]
) -> Pair | None:
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


def bradley_terry(scored: ScoredCandidates, *, scale: float) -> Pair | None:
    """Two candidates at random and one draw of P(i ≻ j) = σ((score_i − score_j) / scale): a noisy labeller."""
    count = len(scored.scores)
    if count < 2:
        return None
    first = int(scored.noise[0] * count)
    second = (first + 1 + int(scored.noise[1] * (count - 1))) % count
    preferred = 1.0 / (1.0 + math.exp(-min(700.0, max(-700.0, (scored.scores[first] - scored.scores[second]) / scale))))
    return (first, second) if scored.noise[2] < preferred else (second, first)


RULES: Mapping[str, Callable[[LabelConfig], Rule]] = {
    "best_worst": lambda config: best_worst,
    "wpo": lambda config: partial(wpo, threshold=config.threshold, gap=config.gap, rejected=config.rejected),
    "bradley_terry": lambda config: partial(bradley_terry, scale=config.scale),
}
"""The rules of pairs by name; :mod:`rayalign.config.policy` says what each of them reads."""


class OwnRule:
    """``function(scores) → (chosen, rejected)``, or None or NaN for no preference; it runs in a process of its own.

    One position twice is no preference too, where all scores are equal: ``argmax`` and ``argmin`` of a tie.

    Raises:
        UserError: there is no such function, or it cannot be imported.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.function = UserFunction(name, ([0.0, 1.0],), keywords={}, seconds=RULE_SECONDS, setting="")
        except UserError as error:
            raise UserError(f"label.name: {error}") from error
        self.remarks = self.function.printed.remarks

    def __call__(self, scored: ScoredCandidates) -> Pair | None:
        scores = list(scored.scores)
        try:
            found = self.function(scores)
        except CallFailed as failure:
            raise UserError(f"label.name: {self.name!r} {failure} for the scores {scores}") from failure
        if (found.value is None and not found.other) or is_nan(found.value) or is_tie(found.value, scores):
            return None
        if not is_pair(found.value, len(scores)):
            raise UserError(
                f"label.name: {self.name!r} returned {found.shown} for {len(scores)} scores: it must return "
                "(chosen, rejected), two different positions in the list, or None"
            )
        chosen, rejected = found.value
        return chosen, rejected


def own_rule(config: LabelConfig) -> OwnRule | None:
    """The user's own rule, where ``config`` names one."""
    return OwnRule(config.name) if ":" in config.name else None


def is_pair(value: object, count: int) -> bool:
    """Whether these are two different positions among ``count``."""
    return are_positions(value, count) and value[0] != value[1]


def is_tie(value: object, scores: Sequence[float]) -> bool:
    """Whether this is one position twice, of scores that are all equal."""
    return are_positions(value, len(scores)) and value[0] == value[1] and min(scores) == max(scores)


def are_positions(value: object, count: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(k) is int and 0 <= k < count for k in value)


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def nearest_in_length(scored: ScoredCandidates, chosen: int, among: Sequence[int]) -> int:
    return min(among, key=lambda k: (abs(scored.lengths[k] - scored.lengths[chosen]), k))
