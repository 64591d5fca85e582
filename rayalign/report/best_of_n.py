"""Best of n: what the reference scores when the best of n of its replies is kept. The yardstick that needs no training.

Its score is estimated without bias from the S ≥ n samples that were drawn anyway. Its KL to the reference is known in
closed form. So it is a point of the same frontier as trained policies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayalign.report.points import EvaluationPoint, as_array
from rayalign.report.statistics import Bootstrap, Estimate, Matrix, Vector, estimate_mean, is_rate, rate_estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """The reference's best of ``n`` on one prompt set; under each scorer the best is chosen by that scorer itself."""

    prompt_set: str
    n: int
    kl_bound: float
    """log n − (n − 1)/n nats: its KL is at most this, and equal to it where no two replies score alike."""
    scores: Mapping[str, Estimate]


def best_of_n(
    reference: EvaluationPoint, bootstrap: Bootstrap, shares: frozenset[str] = frozenset()
) -> tuple[BestOfN, ...]:
    """n = 1, 2, 4, … up to the samples of a prompt; nothing where there is one sample only.

    ``shares`` are the scorers whose scores are rates.
    """
    samples = len(reference.length[0])
    sizes = [2**power for power in range(samples.bit_length())] if samples > 1 else []
    rates = {name for name in shares if name in reference.scores and is_rate(as_array(reference.scores[name]))}

    def score(name: str, n: int) -> Estimate:
        best = expected_best(as_array(reference.scores[name]), n)
        return rate_estimate(best, bootstrap) if name in rates else estimate_mean(best, bootstrap)

    found = []
    for n in sizes:
        scores = {name: score(name, n) for name in reference.scores}
        found.append(BestOfN(prompt_set=reference.prompt_set, n=n, kl_bound=kl_bound(n), scores=scores))
    return tuple(found)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, nats."""
    return math.log(n) - (n - 1) / n


def expected_best(samples: Matrix, n: int) -> Vector:
    """[P, S] to [P]: the mean, over all n-element subsets of a prompt's samples, of their largest.

    That is Σ_i C(i−1, n−1)/C(S, n) · x_(i) over the sorted samples x_(1) ≤ … ≤ x_(S): an unbiased estimate of the
    expected best of n fresh draws. NaN where a prompt has fewer than n samples.
    """
    ordered = np.sort(samples, axis=1)  # a missing sample (NaN) stands last
    present = (~np.isnan(samples)).sum(axis=1)
    best = np.full(len(samples), np.nan)
    for count in np.unique(present).tolist():
        if count >= n:
            weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
            best[present == count] = ordered[present == count, :count] @ weights
    return best
