"""Requests for rounds and the rounds themselves, as files that training workers and the driver share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayalign.engine.batches import Weights
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import ObjectPath, Place, listed, place_of

POLL_SECONDS, OBJECTS_POLL_SECONDS = 0.05, 1.0
"""Between looks at a disk, and at an object store, where every question costs."""


def poll_seconds(place: Place) -> float:
    """The pause between looks for what another process writes at ``place``."""
    return OBJECTS_POLL_SECONDS if isinstance(place, ObjectPath) else POLL_SECONDS


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
        directory = place_of(value["directory"]) if value["directory"] else None
        return cls(
            number=value["number"],
            weights=Weights(**{**fields, "directory": directory, "canary": tuple(value["canary"])}),
        )


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Where rounds are asked for and lie; the only thing that training workers and the driver share."""

    root: Place

    @property
    def weights(self) -> Place:
        return self.root / "weights"

    @property
    def failure(self) -> Place:
        """Holds the message when the driver cannot draw any more."""
        return self.root / "failure.txt"

    def round(self, request: Request) -> Place:
        """The round's token store; other weights make another one, so that none is ever taken for another's."""
        return self.root / f"round_{request.number:06d}-{request.weights.digest[:12]}"

    def here(self, request: Request) -> Request:
        """A request that the run left, perhaps in another place: what it wrote came along."""
        weights = request.weights
        if weights.directory is None:
            return request
        return replace(request, weights=replace(weights, directory=self.weights / weights.directory.name))

    def prepared(self, request: Request, key: str) -> Place:
        """The columns that a method made of a round."""
        return self.root / "prepared" / f"{self.round(request).name}-{key}"

    def ask(self, request: Request) -> None:
        """Leave a request; a later one for the same round revokes it."""
        self._requests.mkdir(parents=True, exist_ok=True)
        write_durably(self._requests / f"{request.number:06d}.json", json.dumps(request.to_json()) + "\n")

    def requests(self) -> list[Request]:
        """What is asked for now, in order of rounds."""
        found = []
        for path in listed(self._requests, "*.json"):
            found.append(Request.from_json(json.loads(path.read_text(encoding="utf-8"))))
        return found

    def answer(self, request: Request) -> None:
        """Take back a request that is fulfilled, unless another one has come in its place."""
        path = self._requests / f"{request.number:06d}.json"
        if path.exists() and Request.from_json(json.loads(path.read_text(encoding="utf-8"))) == request:
            path.unlink(missing_ok=True)

    @property
    def _requests(self) -> Place:
        return self.root / "requests"
