"""How long to wait before a call is made again: longer each time, as long as the server asks for, and not for ever."""

from __future__ import annotations

import datetime
import email.utils
import math
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST_SECONDS = 0.5
MOST_SECONDS = 30.0


class Clock:
    """The time, and waiting in it."""

    def now(self) -> float:
        """Seconds that never go backwards."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, seconds: float, given_up: threading.Event) -> None:
        """Return after ``seconds``, or once somebody has given up."""
        given_up.wait(seconds)


@dataclass(slots=True)
class Patience:
    """What several threads know together of one server that may be busy.

    A call is made again until the server has answered none of them for ``seconds``; one that has never said anything
    gets ``unknown_seconds``.
    """

    seconds: float
    unknown_seconds: float
    clock: Clock = field(default_factory=Clock)
    random: random.Random = field(default_factory=random.Random)
    given_up: threading.Event = field(default_factory=threading.Event)
    reached: bool = False
    """It has said something, be it that it is busy."""
    answered: float = -math.inf
    """When it answered last."""
    not_before: float = -math.inf
    """It asked for no call before then."""

    def delay(self, tries: int, asked_for: float | None) -> float:
        """Seconds until the next call of one that was made ``tries`` times: what the server asks for, and jitter."""
        longest = min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(tries - 1, 30))
        jitter = longest * (0.5 + 0.5 * self.random.random())
        if asked_for is None:
            return jitter
        self.not_before = max(self.not_before, self.clock.now() + asked_for)
        return asked_for + min(jitter, 1.0)

    def is_over(self, began: float, delay: float) -> bool:
        """Whether a call that began at ``began`` is not to be made again after ``delay``."""
        limit = self.seconds if self.reached else min(self.seconds, self.unknown_seconds)
        since = max(began, self.answered)
        return self.given_up.is_set() or self.clock.now() + delay - since > limit

    def wait(self, seconds: float) -> None:
        self.clock.wait(seconds, self.given_up)

    def hold(self) -> None:
        """Wait as long as the server asked another thread to."""
        while (left := self.not_before - self.clock.now()) > 0 and not self.given_up.is_set():
            self.wait(left + self.random.random())


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks for in ``Retry-After`` (seconds, or a date) or ``retry-after-ms``; None: in neither.

    A date is held against the server's own ``Date``, where it has one, since clocks differ.
    """
    milliseconds = as_seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    asked = headers.get("retry-after")
    seconds = as_seconds(asked)
    if seconds is not None:
        return seconds
    until, sent = as_date(asked), as_date(headers.get("date"))
    return max(0.0, until - (now if sent is None else sent)) if until is not None else None


def as_seconds(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def as_date(text: str | None) -> float | None:
    try:
        found = email.utils.parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
