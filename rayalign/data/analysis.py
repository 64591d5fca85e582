"""What is in a file of preferences: formats, lengths, and what a careful reader would stumble over. Pure counting."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from rayalign.data.chat import Chat
from rayalign.data.records import BadRow
from rayalign.data.render import RULES
from rayalign.data.schema import Example, Message, Turns, is_assistant
from rayalign.data.tokenize import DroppedRow, Outcome, Tokenized

FINDINGS: Mapping[str, str] = MappingProxyType(
    {
        "duplicates": "the same prompt and answers as an earlier row",
        "conflicts": "an earlier row with the opposite label",
        "identical": "chosen and rejected are equal",
        "undecided": "no answer is preferred: left out by methods that learn preferences",
        "inverted_scores": "chosen has a lower score than rejected",
        "tied_scores": "chosen and rejected have the same score",
        "empty": "an answer without text: its response is the end token alone",
        "double_bos": "the text itself starts with the tokenizer's beginning-of-sequence token; one is kept",
        "long_prompts": "cut from the left, since prompt and response do not fit max_tokens",
        "long_responses": "cut from the right, at max_tokens",
        "no_end": "rows with a response that has no end token",
        "dropped": "left out: it does not fit",
        "in_eval": "the prompt is also in the held-out files",
        **RULES,
    }
)
"""Name of every count → what it counts, in rows."""

_Key = bytes


@dataclass(slots=True)
class Seen:
    """Digests of all rows so far, over all files."""

    rows: dict[_Key, _Key] = field(default_factory=dict)
    """Prompt and answers in any order → the row with its order and labels."""
    eval_prompts: frozenset[_Key] = frozenset()


@dataclass(slots=True)
class FileFindings:
    """Counts of one file, filled row by row; rows = good + bad."""

    source: str
    good: int = 0
    bad: int = 0
    left_out: int = 0
    """Good rows in which nothing is preferred, where a method learns preferences."""
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows are bad, numbers left out."""
    counts: Counter[str] = field(default_factory=Counter)
    """A key of :data:`FINDINGS`."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns that hold something and were not read, in how many rows."""
    metadata: Counter[str] = field(default_factory=Counter)
    """The same of columns that only describe their row."""
    labels: Counter[str] = field(default_factory=Counter)
    """``desirable`` and ``undesirable`` answers."""
    lacking: Counter[str] = field(default_factory=Counter)
    """What the method needs of every row → rows that lack it."""
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """``prompt_`` and ``response_characters``, ``prompt_`` and ``response_tokens``, before anything is cut."""

    def add_bad(self, row: BadRow) -> None:
        self.bad += 1
        self.reasons[re.sub(r"(?<![-\w])\d[\d,.]*", "…", row.reason)] += 1

    def add_text(self, example: Example, seen: Seen) -> None:
        """Count what the text of one good row shows."""
        self._describe(example)
        answers = [text_to_compare(answer) for answer in example.candidates]
        self._measure("prompt_characters", [len(text_to_compare(example.prompt))])
        self._measure("response_characters", [len(answer) for answer in answers])
        self.counts["identical"] += len(answers) > 1 and len(set(answers)) < len(answers)
        self.counts["empty"] += any(not _says_something(answer) for answer in example.candidates)
        self.counts["in_eval"] += prompt_key(example) in seen.eval_prompts
        ordered = _digest([text_to_compare(example.prompt), answers, list(example.columns.get("label", ()))])
        earlier = seen.rows.setdefault(_digest([text_to_compare(example.prompt), sorted(answers)]), ordered)
        if earlier is not ordered:
            self.counts["duplicates" if earlier == ordered else "conflicts"] += 1

    def add_left_out(self, example: Example) -> None:
        """Count a good row in which nothing is preferred, for a method that learns preferences."""
        self.left_out += 1
        self._describe(example)

    def add_lacking(self, example: Example, needs: Iterable[str]) -> None:
        """Count what a method needs of every row and this one lacks."""
        for name in needs:
            values = example.columns.get(name, ())
            held = bool(example.candidates) if name == "completion" else values and not any(map(math.isnan, values))
            self.lacking[name] += not held

    def _describe(self, example: Example) -> None:
        """Count a good row by its format, the columns that were not read, and what it says of its answers."""
        self.good += 1
        self.formats[example.format if isinstance(example.prompt, str) else f"{example.format} (turns)"] += 1
        self.unread.update(example.unread)
        self.metadata.update(example.metadata)
        self.counts["undecided"] += example.preference == "undecided"
        for value in example.columns.get("label", ()):
            self.labels["desirable" if value else "undesirable"] += 1
        scores = example.columns.get("reward", ())
        if example.preference == "stored" and len(scores) == 2:
            self.counts["inverted_scores"] += scores[0] < scores[1]
            self.counts["tied_scores"] += scores[0] == scores[1]

    def add_tokens(self, example: Example, outcome: Outcome, chat: Chat) -> None:
        """Count what the tokens of one good row show."""
        if isinstance(outcome, BadRow):
            self.good -= 1
            self.add_bad(outcome)
            return
        truncation = outcome.truncation
        self.counts["long_prompts"] += truncation.prompt > 0
        self.counts["long_responses"] += any(truncation.responses)
        self.counts["dropped"] += isinstance(outcome, DroppedRow)
        self.counts.update(outcome.rules if isinstance(outcome, Tokenized) else ())
        bos = chat.tokenizer.bos_token
        self.counts["double_bos"] += bool(bos) and _first_text(example).lstrip().startswith(bos)
        if isinstance(outcome, Tokenized):
            group = outcome.group
            self._measure("prompt_tokens", [len(group.prompt_ids) + truncation.prompt])
            self._measure(
                "response_tokens",
                [len(answer.ids) + cut for answer, cut in zip(group.candidates, truncation.responses, strict=True)],
            )
            self.counts["no_end"] += not all(answer.finished for answer in group.candidates)

    def quantiles(self, name: str) -> tuple[int, int, int, int] | None:
        """Minimum, median, 95th percentile and maximum of a length; None where nothing was measured."""
        values = self.lengths.get(name)
        if not values:
            return None
        low, middle, high, top = np.quantile(values, [0, 0.5, 0.95, 1], method="lower").tolist()
        return low, middle, high, top

    def as_json(self) -> dict[str, object]:
        """The same findings as plain data."""
        names = ("min", "median", "p95", "max")
        return {
            "file": self.source,
            "rows": self.good + self.bad,
            "good": self.good,
            "bad": self.bad,
            "formats": dict(self.formats),
            "reasons": dict(self.reasons),
            "not_read": dict(self.unread),
            "metadata_not_read": dict(self.metadata),
            "labels": dict(self.labels),
            "lacking": {name: count for name, count in self.lacking.items() if count},
            "lengths": {name: dict(zip(names, self.quantiles(name) or (), strict=False)) for name in self.lengths},
            **{name: self.counts[name] for name in FINDINGS},
        }

    def _measure(self, name: str, values: Sequence[int]) -> None:
        self.lengths.setdefault(name, []).extend(values)


def text_to_compare(text: str | Turns) -> str:
    """A text, or turns as one text that tells different turns apart."""
    return text if isinstance(text, str) else "\n".join(map(_turn, text))


def _turn(turn: Message) -> str:
    calls = f" {json.dumps(turn['tool_calls'])}" if turn.get("tool_calls") else ""
    return f"{turn['role']}: {turn['content']}{calls}"


def prompt_key(example: Example) -> bytes:
    """Equal for the same prompt as a text and as one user turn."""
    prompt = example.prompt
    alone = not isinstance(prompt, str) and len(prompt) == 1
    return _digest(
        (str(prompt[0]["content"]) if alone and not isinstance(prompt, str) else text_to_compare(prompt)).strip()
    )


def _says_something(answer: str | Turns) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return all(turn["content"].strip() or turn.get("tool_calls") for turn in answer if is_assistant(turn))


def _first_text(example: Example) -> str:
    prompt = example.prompt or example.candidates[0]
    return prompt if isinstance(prompt, str) else str(prompt[0]["content"])


def _digest(value: object) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
