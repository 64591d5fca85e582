"""A mistake in a configuration: where, which field, what is wrong and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rayalign.errors import UserError

FieldPath = tuple[str | int, ...]
"""Keys and list indices from the root: ``("data", "train", 0, "path")``."""


def dotted(path: FieldPath) -> str:
    """``data.train[0].path``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. ``where`` is ``file:line`` or ``command line``."""

    where: str
    field: str
    message: str
    illegal: bool = False
    """Well-formed, but not together with the rest: a comparison skips such a cell."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


class ConfigError(UserError):
    """A configuration cannot be used; one line per mistake."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))
