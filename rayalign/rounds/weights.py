"""How the weights of a run reach the actors that sample them; without a channel they lie in a folder."""

from __future__ import annotations

from typing import Protocol

from rayalign.engine.batches import State, Weights
from rayalign.errors import UserError

BOARD = "weights"
"""Where the workers and actors of a trainer learn of weights, unless it names another."""


class WeightsGone(UserError):
    """The weights that were asked for exist no more: the attempt that sent them has ended."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(f"the weights of step {weights.step} ended with the training process that held them")
        self.weights = weights

    def __reduce__(self) -> tuple[type[WeightsGone], tuple[Weights]]:
        return type(self), (self.weights,)


class WeightChannel(Protocol):
    """A way from the training process to the actors that sample."""

    def send(self, weights: Weights, state: State) -> None:
        """Make ``state`` known as the version that ``weights`` names."""
        ...

    def fetch(self, weights: Weights) -> State | None:
        """Exactly these weights; None where they lie in ``weights.directory`` only.

        Raises:
            WeightsGone: they are nowhere any more.
        """
        ...
