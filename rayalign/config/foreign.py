"""Keys of other trainers, answered with ours: what someone who brings a YAML from elsewhere reads.

``foreign.yaml`` has the answers, and says what its entries mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any

import yaml

from rayalign.config.errors import FieldPath, dotted


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalent:
    """What to write instead of a key."""

    ours: str = ""
    """The field that holds the same thing."""
    say: str = ""
    """A sentence, where none does."""
    translates: str = ""
    """``method`` or ``track``: the key's value is translated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``foreign.yaml``, ready to be asked."""

    answers: Mapping[tuple[str, ...], Equivalent]
    """By the parts of a key; a key of the top level alone begins with ``^``."""
    patterns: tuple[tuple[tuple[str, ...], Equivalent], ...]
    """Those with a ``*``, most parts first."""
    blocks: Mapping[str, str]
    trackers: Mapping[str, str]
    methods: Mapping[str, str]
    unknown_methods: frozenset[str]
    parameters: Mapping[str, Mapping[str, str]]
    aliases: Mapping[str, str]

    def exact(self, parts: Sequence[str]) -> Equivalent | None:
        """The answer of the longest key that is the end of a path."""
        if len(parts) == 1 and ("^", parts[0]) in self.answers:
            return self.answers["^", parts[0]]
        found = (self.answers.get(tuple(parts[first:])) for first in range(len(parts)))
        return next((answer for answer in found if answer is not None), None)

    def matched(self, parts: Sequence[str]) -> Equivalent | None:
        """The answer of the longest pattern that fits the end of a path."""
        for pattern, answer in self.patterns:
            end = parts[-len(pattern) :]
            if len(end) == len(pattern) and all(map(fnmatchcase, end, pattern)):
                return answer
        return None


@cache
def foreign_table() -> Table:
    """The table; read once."""
    text = resources.files("rayalign.config").joinpath("foreign.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    answers: dict[tuple[str, ...], Equivalent] = {}
    patterns: dict[tuple[str, ...], Equivalent] = {}
    for entry in data["answers"]:
        translates = next((kind for kind in ("method", "track") if entry.get(kind)), "")
        answer = Equivalent(ours=entry.get("ours", ""), say=entry.get("say", ""), translates=translates)
        for key in entry["keys"]:
            parts = ("^", key[1:]) if key.startswith("^") else tuple(key.split("."))
            (patterns if "*" in key else answers)[parts] = answer
    ordered = sorted(patterns.items(), key=lambda item: (-len(item[0]), -len(".".join(item[0]))))
    return Table(
        answers=answers,
        patterns=tuple(ordered),
        blocks=data["blocks"],
        trackers={str(key): said for key, said in data["trackers"].items()},
        methods=data["methods"],
        unknown_methods=frozenset(data["unknown_methods"]),
        parameters=data["parameters"],
        aliases=data["aliases"],
    )


def foreign_advice(path: FieldPath, value: object) -> str | None:
    """What to write instead of another trainer's ``value`` at ``path``; None for a key that none of them has."""
    parts = parts_of_key(path)
    answer = foreign_table().exact(parts) or foreign_table().matched(parts)
    if answer is None or answer.ours == ".".join(parts):
        return None
    if answer.translates == "method":
        return method_advice(value)
    if answer.translates == "track":
        return track_advice(value)
    return f"did you mean {answer.ours}?" if answer.ours else answer.say


def answers_within(path: FieldPath, value: object) -> list[tuple[FieldPath, str | None]]:
    """(path, answer) of an unknown key, or of everything in it where it is a block without an answer of its own.

    An answer is None where no other trainer has the key.
    """
    children = list(_children(path, value))
    if not children or foreign_table().exact(parts_of_key(path)) is not None:
        return [(path, foreign_advice(path, value))]
    found = list(chain.from_iterable(answers_within(child, item) for child, item in children))
    return found if any(said is not None for _, said in found) else [(path, foreign_advice(path, value))]


def _children(path: FieldPath, value: object) -> Iterator[tuple[FieldPath, Any]]:
    if isinstance(value, Mapping):
        yield from (((*path, str(key)), item) for key, item in value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        yield from (((*path, index), item) for index, item in enumerate(value))


def parts_of_key(path: FieldPath) -> list[str]:
    """A path without the places in lists; ``--learning-rate`` is ``learning_rate``."""
    return [part.removeprefix("--").replace("-", "_") for part in path if isinstance(part, str)]


def method_advice(value: object) -> str:
    """How the loss of another trainer is written here."""
    from rayalign.methods import METHODS

    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    for name in map(str, names):
        if name in foreign_table().unknown_methods:
            return (
                f"no method here is {name}; see docs/explanation/methods.md, or write one of your own (module:METHOD)"
            )
        ours = foreign_table().methods.get(name, name if name in METHODS else "")
        if ours and len(names) == 1:
            return f"write method: {ours if ours.startswith('{') else f'{{name: {ours}}}'}"
    return f"the loss is the method: write method: {{name: …}}, one of {' | '.join(METHODS)}"


def track_advice(value: object) -> str:
    """How the trackers of another trainer are written here."""
    given = value if isinstance(value, list) else [value]
    names = [str(name).lower() for name in given]
    if len(names) == 1 and names[0] in foreign_table().trackers:
        return foreign_table().trackers[names[0]]
    known = [name for name in names if name in ("tensorboard", "wandb")]
    return f"write track: [{', '.join(known)}]" + ("" if known == names else "; tensorboard and wandb are the trackers")


def parameter_in_method(method: str, key: str) -> str:
    """What a parameter of others is called in ``method``, or a sentence where its value is another; empty for none."""
    usual = foreign_table().aliases.get(key.lower(), key.lower())
    return foreign_table().parameters.get(method, {}).get(usual, usual if usual != key else "")


def block_advice(path: FieldPath) -> str:
    """What to write where others have a plain value for one of our blocks; empty where they have none."""
    return foreign_table().blocks.get(dotted(path), "")
