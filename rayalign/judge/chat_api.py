"""What OpenAI-compatible servers send back: the text of an answer, and errors in the many forms that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUSY = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
"""Statuses that may pass."""
OPTIONAL = ("temperature", "seed", "max_tokens", "max_completion_tokens")
"""Parameters that an endpoint may refuse, and be asked without."""
_REFUSAL = (
    r"(?:unsupported|not support|unrecognized|unknown|unexpected|extra"
    r"|not permitted|not allowed|only the default|invalid|deprecated|no longer|must be)"
)
EXCERPT = 300
"""Characters of what a server says."""


class Busy(Exception):
    """A call that may succeed later; ``after`` is how many seconds later, where the server says so."""

    def __init__(self, reason: str, *, after: float | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.after = after
        self.status = status


class NoAnswer(Exception):
    """A call that gave no text; ``final``: the same question would fail again."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What came over HTTP, whatever its status."""

    status: int
    phrase: str
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes
    secret: str
    """What must not be shown of it."""

    @property
    def kind(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def value(self) -> Any:
        """The JSON in it; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def shown(self, text: object) -> str:
        """Something of it in one line, cut, without the secret, and in characters that can be written."""
        writable = str(text).encode("utf-8", errors="backslashreplace").decode()
        line = " ".join(writable.replace(self.secret, "(key)").split())
        return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}…"

    def said(self) -> str:
        """What it says went wrong: the message in its JSON, its plain text, or the phrase of its status."""
        words = _message(self.value())
        if not words and self.kind == "text/plain":
            words = self.text
        return self.shown(words or self.phrase)

    def code(self) -> object:
        """The code or type of the error in its JSON; None where there is none."""
        value = self.value()
        error = value.get("error") if isinstance(value, dict) else None
        return (error.get("code") or error.get("type")) if isinstance(error, dict) else None


def text_of(response: Response) -> str:
    """The text of a successful response.

    Raises:
        Busy: it holds an error that may pass.
        NoAnswer: it holds no text; the message says what it holds.
    """
    value = response.value()
    if not isinstance(value, dict):
        kind = f" {response.kind}" if response.kind else ""
        raise NoAnswer(f"it answers{kind} that is not the JSON of an answer: {response.shown(response.text)!r}")
    if value.get("error"):
        code = response.code()
        if isinstance(code, int) and code in BUSY:
            raise Busy(f"it answers an error, {code} {response.said()}", status=code)
        raise NoAnswer(f"it answers an error: {response.said()}")
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise NoAnswer(f"its answer holds no message: {response.shown(response.text)!r}")
    if choice.get("finish_reason") == "length":
        raise NoAnswer("the answer was cut at a limit of tokens")
    if choice.get("finish_reason") == "content_filter":
        raise NoAnswer("the endpoint's filter took the answer away")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if isinstance(content, str) and content.strip():
        return content.replace(response.secret, "(key)")
    if message.get("refusal"):
        raise NoAnswer(f"the model refuses to answer: {response.shown(message['refusal'])!r}")
    thought = message.get("reasoning_content") or message.get("reasoning")
    raise NoAnswer("the answer is a thought with nothing after it" if thought else "the answer is empty")


def refused_parameter(response: Response, sent: Mapping[str, Any]) -> str | None:
    """Which of the optional parameters that were ``sent`` a response calls unsupported; None: none."""
    value = response.value()
    error = value.get("error") if isinstance(value, dict) else None
    named = error.get("param") if isinstance(error, dict) else None
    optional = [name for name in OPTIONAL if name in sent]
    if named in optional:
        return str(named)
    for name in optional:
        near = rf"\b{name}\b.{{0,120}}?{_REFUSAL}|{_REFUSAL}.{{0,120}}?\b{name}\b"
        if re.search(near, response.text, re.IGNORECASE | re.DOTALL):
            return name
    return None


def asks_for_the_default(response: Response, sent: Mapping[str, Any]) -> bool:
    """Whether a response to a call without a temperature insists on one of 1."""
    insists = re.search(r"\btemperature\b.{0,200}?\(1(?:\.0)?\)", response.text, re.IGNORECASE | re.DOTALL)
    return insists is not None and "temperature" not in sent


def _message(value: Any) -> str:
    if isinstance(value, dict):
        for key in ("error", "message", "detail", "msg"):
            if value.get(key):
                return _message(value[key])
    return "" if not value else value if isinstance(value, str) else json.dumps(value)
