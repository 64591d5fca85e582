"""Which round serves which step, and with which weights it is drawn. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayalign.data.stream import hybrid_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Round r serves the steps [r·k, (r + 1)·k) with k = ``refresh_every``.

    Raises ValueError for a plan without steps.
    """

    steps: int
    """Steps of the whole run."""
    refresh_every: int
    lag: int
    """Rounds by which the weights are behind: 0 is synchronous, at 1 a round is drawn while the one before trains."""
    groups_per_step: int
    """Fresh and stored together."""
    fresh_fraction: float = 1.0
    passes: int = 1
    """Times that a round's groups are trained on, pass after pass, where all groups are fresh."""

    def __post_init__(self) -> None:
        if min(self.steps, self.refresh_every, self.groups_per_step, self.passes) < 1 or self.lag < 0:
            raise ValueError(f"a plan needs steps, refresh_every, groups_per_step and passes of at least 1: {self}")
        if self.refresh_every % self.passes or (self.passes > 1 and self.fresh_fraction < 1):
            raise ValueError(f"the steps of a round are whole passes over groups that are all fresh: {self}")

    @property
    def num_rounds(self) -> int:
        return math.ceil(self.steps / self.refresh_every)

    @property
    def pass_steps(self) -> int:
        """Steps of one pass over a round."""
        return self.refresh_every // self.passes

    def round_of(self, step: int) -> int:
        return step // self.refresh_every

    def pass_of(self, step: int) -> int:
        """Which pass over its round ``step`` belongs to, from 0."""
        return step % self.refresh_every // self.pass_steps

    def weights_step(self, number: int) -> int:
        """The step before which round ``number``'s weights are taken: (r − lag)·k, or 0 where that is negative."""
        return max(0, (number - self.lag) * self.refresh_every)

    def rounds_drawn_at(self, step: int) -> range:
        """The rounds that are drawn with the weights that step ``step`` begins with; several at step 0 when lagging."""
        if step % self.refresh_every:
            return range(0)
        number = step // self.refresh_every
        first, last = (0, self.lag) if number == 0 else (number + self.lag, number + self.lag)
        return range(min(first, self.num_rounds), min(last + 1, self.num_rounds))

    def positions(self, step: int) -> range:
        """Positions, in the stream of fresh groups, that step ``step`` trains on."""
        if self.fresh_fraction == 1:
            number, inside = divmod(step, self.refresh_every)
            slot = number * self.pass_steps + inside % self.pass_steps
            return range(slot * self.groups_per_step, (slot + 1) * self.groups_per_step)
        fresh, _ = hybrid_positions(step, groups_per_step=self.groups_per_step, fresh_fraction=self.fresh_fraction)
        return fresh

    def round_positions(self, number: int) -> range:
        """Positions of all fresh groups of a round; the last round is as long as its steps."""
        first = number * self.refresh_every
        last = min(first + self.pass_steps, self.steps) - 1
        return range(self.positions(first).start, self.positions(last).stop)
