"""Which round serves which step, and with which weights it is drawn. Pure arithmetic: the plan of fresh groups."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rayalign.data.stream import hybrid_positions
from rayalign.engine.batches import Weights
from rayalign.storage.manifest import write_durably


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Round r serves the steps [r·k, (r + 1)·k) with k = ``refresh_every``.

    Raises ValueError for a plan without steps.
    """

    steps: int
    """Of the whole run."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A round that the workers need, and the only weights that it may be drawn with."""

    number: int
    weights: Weights

    def to_json(self) -> dict[str, Any]:
        directory = self.weights.directory
        return {"number": self.number, **asdict(self.weights), "directory": str(directory) if directory else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Request:
        fields = {name: value[name] for name in Weights.__slots__}
        directory = Path(value["directory"]) if value["directory"] else None
        return cls(
            number=value["number"],
            weights=Weights(**{**fields, "directory": directory, "canary": tuple(value["canary"])}),
        )


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Where rounds are asked for and lie; the only thing that training workers and the driver share."""

    root: Path

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def failure(self) -> Path:
        """Holds the message when the driver cannot draw any more."""
        return self.root / "failure.txt"

    def round(self, request: Request) -> Path:
        """The round's token store; other weights make another one, so that none is ever taken for another's."""
        return self.root / f"round_{request.number:06d}-{request.weights.digest[:12]}"

    def here(self, request: Request) -> Request:
        """A request that the run left, perhaps in another place: what it wrote came along."""
        weights = request.weights
        if weights.directory is None:
            return request
        return replace(request, weights=replace(weights, directory=self.weights / weights.directory.name))

    def prepared(self, request: Request, key: str) -> Path:
        """The columns that a method made of a round."""
        return self.root / "prepared" / f"{self.round(request).name}-{key}"

    def ask(self, request: Request) -> None:
        """Leave a request; a later one for the same round revokes it."""
        self._requests.mkdir(parents=True, exist_ok=True)
        write_durably(self._requests / f"{request.number:06d}.json", json.dumps(request.to_json()) + "\n")

    def requests(self) -> list[Request]:
        """What is asked for now, in order of rounds."""
        found = []
        for path in sorted(self._requests.glob("*.json")):
            found.append(Request.from_json(json.loads(path.read_text(encoding="utf-8"))))
        return found

    def answer(self, request: Request) -> None:
        """Take back a request that is fulfilled, unless another one has come in its place."""
        path = self._requests / f"{request.number:06d}.json"
        if path.exists() and Request.from_json(json.loads(path.read_text(encoding="utf-8"))) == request:
            path.unlink()

    @property
    def _requests(self) -> Path:
        return self.root / "requests"
