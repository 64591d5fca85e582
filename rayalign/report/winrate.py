"""Win rate of a policy against the reference under one scorer: share of wins plus half of the ties."""

from __future__ import annotations

import numpy as np

from rayalign.report.statistics import Matrix, Vector


def win_shares(policy: Matrix, reference: Matrix) -> Vector:
    """Scores [P, S] and [P, S'] of the same prompts to [P]: the share of the S x S' pairings that the policy wins.

    A tie counts one half. A pairing without both scores does not count; a prompt without pairings is NaN.
    """
    difference = policy[:, :, None] - reference[:, None, :]
    pairings = (~np.isnan(difference)).sum(axis=(1, 2))
    wins = (difference > 0).sum(axis=(1, 2)) + 0.5 * (difference == 0).sum(axis=(1, 2))
    return np.where(pairings > 0, wins / np.maximum(pairings, 1), np.nan)
