"""What runs out of sight and is to be seen once: what a user's function prints, what an endpoint refuses."""

from __future__ import annotations

import threading

MOST = 20
CHARACTERS = 200


class Remarks:
    """The first distinct lines, each once; from several threads too. They reach the console with the work's result."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._new: list[str] = []
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        text = "".join(filter(str.isprintable, line)).rstrip()[:CHARACTERS]  # whatever it says of colours and cursors
        with self._lock:
            if text and text not in self._seen and len(self._seen) < MOST:
                self._seen.add(text)
                self._new.append(text)

    def take(self) -> tuple[str, ...]:
        """Those that were not taken before."""
        with self._lock:
            taken, self._new = tuple(self._new), []
        return taken


def remarks_of(thing: object) -> tuple[str, ...]:
    """What ``thing`` has to tell, if it remarks on anything."""
    remarks: Remarks | None = getattr(thing, "remarks", None)
    return remarks.take() if remarks is not None else ()
