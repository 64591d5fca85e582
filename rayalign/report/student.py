"""Student's t distribution, for real degrees of freedom ≥ 1."""

from __future__ import annotations

import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)


def two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|): with T = √df · cot u the density is proportional to sin^{df−1} u, integrated from 0 to acot."""
    end = math.atan2(math.sqrt(df), abs(t))
    integral = end / 2 * float(WEIGHTS @ np.sin(end / 2 * (NODES + 1)) ** (df - 1))
    log_whole = math.log(math.pi) / 2 + math.lgamma(df / 2) - math.lgamma((df + 1) / 2) - math.log(2)
    return min(1.0, integral / math.exp(log_whole))


def quantile(probability: float, df: float) -> float:
    """The t that T is below with ``probability`` in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > 2 * (1 - probability):
        low, high = high, 2 * high
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 2 * (1 - probability) else (low, middle)
    return high
