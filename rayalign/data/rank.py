"""The order of a group's candidates, as a reward model learns it: place 0 is the best, equal places are ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayalign.data.group import Column, Group


def places_of_scores(rewards: Sequence[float] | Column) -> Column:
    """How many candidates have a higher reward."""
    values = np.asarray(rewards, dtype=np.float32)
    rank: Column = np.count_nonzero(values[None, :] > values[:, None], axis=1).astype(np.float32)
    return rank


def rank_group(group: Group, *, by_reward: bool) -> tuple[Group, ...]:
    """The group with its ``rank``; none where every place is the same, so that nothing is preferred.

    ``by_reward=False`` takes the places that the data gave, or else a stored pair: chosen before rejected, whatever
    scores stand beside them.
    """
    if by_reward:
        rank = places_of_scores(group.per_candidate["reward"])
    else:
        rank = (
            places_of_scores(-group.per_candidate["rank"])
            if "rank" in group.per_candidate
            else np.array([0, 1], np.float32)
        )
    if not rank.any():
        return ()
    return (replace(group, per_candidate={**group.per_candidate, "rank": rank}),)
