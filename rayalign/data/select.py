"""Which groups of a store are trained on: those whose completions the initial policy is likeliest to write.

WPO's control: does its weight help, or merely training on likely pairs? (Zhou et al. 2024, arXiv:2406.11827)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from rayalign.data.index import Piece, offsets
from rayalign.data.store import TokenStore
from rayalign.errors import UserError
from rayalign.storage.cache import fetched, whole, working
from rayalign.storage.place import Place

Rows = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a filter keeps of several stores, all held to one threshold."""

    threshold: float
    """The lowest score that is kept, nats per token."""
    kept: tuple[Rows, ...]
    """Ascending rows of every store."""


def likelihood(token_logp: Sequence[float] | NDArray[np.float32], num_predicted: Sequence[int]) -> float:
    """Mean over completions of (Σ_t log π(y_t | x, y_<t) / |y|), nats per token.

    For a pair this is half the logarithm of WPO's weight w(x, y_w) · w(x, y_l) before any clamp and with
    ``alignment: none``, taken once, of the initial policy at temperature 1: both put pairs into one order.

    Args:
        token_logp: of the predicted tokens, completion after completion; those of later ones may follow.
        num_predicted: |y| of each completion that counts, end token included.
    """
    values = np.asarray(token_logp, np.float64)
    ends = np.cumsum(num_predicted)
    means = [values[stop - length : stop].mean() for stop, length in zip(ends, num_predicted, strict=True)]
    return float(np.mean(means))


def likelihoods(piece: Piece, token_logp: NDArray[np.float32], own_candidates: int | None) -> Scores:
    """[groups] :func:`likelihood` of each group of ``piece``, of its first ``own_candidates``; None counts all."""
    lengths = piece.candidate_predicted
    means = np.add.reduceat(token_logp.astype(np.float64), offsets(lengths)[:-1]) / lengths
    counted = piece.place < (own_candidates if own_candidates is not None else len(lengths))
    owner = piece.owner[counted]
    return np.bincount(owner, means[counted], len(piece)) / np.bincount(owner, minlength=len(piece))


def scores_of(store: TokenStore, *, column: str, own_candidates: int | None) -> Scores:
    """:func:`likelihoods` of every group, from the log-probs in the per-token ``column``.

    ``own_candidates`` is how many of a group's completions count, from the first one on; None counts all.

    Raises:
        UserError: the policy has no finite log-prob for a completion; the message names file and line.
    """
    scores = np.concatenate([np.empty(0), *(likelihoods(*part, own_candidates) for part in store.column(column))])
    broken = np.flatnonzero(~np.isfinite(scores))
    if len(broken):
        raise UserError(
            f"filter: the policy's log-probability of {store.index.name(int(broken[0]))} is {scores[broken[0]]} "
            f"({len(broken)} of {len(store)} rows are affected); check model.name and model.dtype"
        )
    return scores


def select_best(scores: Sequence[Scores], quantile: float) -> Selection:
    """Keep the ⌈(1 − quantile) · n⌉ highest scores of all stores together, and whatever ties with the lowest of them.

    Hence the result depends on the scores alone, not on the order of rows or of stores, and is never empty.

    Raises:
        ValueError: ``quantile`` is outside (0, 1), or there is no score.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} is outside (0, 1)")
    together = np.sort(np.concatenate(scores))
    if not len(together):
        raise ValueError("there is no score")
    # exactly: 1 − 0.7 is more than 0.3 in floating point, and one pair of ten too many would be kept
    count = math.ceil((1 - Fraction(quantile).limit_denominator(10**6)) * len(together))
    threshold = float(together[-max(1, count)])
    return Selection(threshold=threshold, kept=tuple(np.flatnonzero(own >= threshold) for own in scores))


def rows_file(directory: Place, number: int) -> Place:
    """Where the kept rows of store ``number`` lie."""
    return directory / f"{number:04d}.npy"


def write_selected_rows(directory: Place, selection: Selection) -> None:
    """One file of rows per store, before the commit of ``directory``."""
    with working(directory) as local:
        for number, rows in enumerate(selection.kept):
            np.save(local / rows_file(directory, number).name, rows.astype("<i8"))


def read_selected_rows(path: Place) -> Rows:
    """The rows in a file of a committed selection; raises TornDirectory where the folder is not whole."""
    whole(path.parent)
    rows: Rows = np.load(fetched(path.parent) / path.name).astype(np.int64)
    return rows
