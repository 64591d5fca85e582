"""Options of the command line as a configuration's block, so that both have one meaning and one check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rayalign.config.document import Document
from rayalign.config.explain import explain
from rayalign.config.fields import Block
from rayalign.errors import UserError

B = TypeVar("B", bound=Block)


def block_of(kind: type[B], given: Mapping[str, Any]) -> B:
    """The block that the options describe; raises UserError for a value that no block of its kind could have."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = explain(error, Document(data=dict(given), directory=Path.cwd()), model=kind)[0]
        option = f"--{problem.field.replace('_', '-')}: " if problem.field else ""
        raise UserError(f"{option}{problem.message}") from error


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """``prompt=question`` → ``{prompt: question}``."""
    pairs = [item.partition("=") for item in given]
    if wrong := next(
        (item for item, (ours, _, theirs) in zip(given, pairs, strict=True) if not (ours and theirs)), None
    ):
        raise UserError(f"--columns {wrong}: write our column, =, and the file's: prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}
