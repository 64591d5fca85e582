"""What to write where no format is found: the columns that a row has, under the names that they could have."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rayalign.data.formats.names import ANSWERS, PROMPTS, first_known_name
from rayalign.data.schema import Fields

_SIDES = ("chosen", "rejected")
_UNKNOWN = "columns: {prompt: …, completion: …} or columns: {prompt: …, chosen: …, rejected: …}"


def nothing_found(row: Fields, named: Collection[str]) -> str:
    """Why a row is of no format, and what to write."""
    listed = ", ".join(sorted(row)) or "none"
    if named:
        return f"no format has these columns: {listed}, and reads {', '.join(sorted(named))}, as `columns` names them"
    guessed = guess(row)
    write = f"name them, such as {columns_as_yaml(guessed)}" if guessed else f"name them, {_UNKNOWN}"
    if guessed and (left := _left_out(row, guessed)):
        write += f" (which leaves out {', '.join(left)}: put what belongs together into one column)"
    if "text" in row:
        write += ", or write format: text to learn that text alone"
    return f"no format has these columns: {listed}; {write}"


def guess(row: Fields) -> dict[str, str]:
    """Our column → the one that could be meant; none where there is no prompt."""
    prompt = first_known_name(row, PROMPTS)
    if prompt is None:
        return {}
    said = [name for name, value in row.items() if isinstance(value, str | list | dict)]
    answers: dict[str, str] = {}
    for side in _SIDES:
        meant = [name for name in said if side in name.lower()]
        if meant:
            answers[side] = meant[0]
    if len(answers) == len(_SIDES):
        return {"prompt": prompt, **answers}
    completion = first_known_name(row, ANSWERS)
    return {"prompt": prompt, "completion": completion} if completion is not None else {"prompt": prompt}


def columns_as_yaml(columns: dict[str, str]) -> str:
    """``columns`` as the YAML has it."""
    return f"columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}"


def _left_out(row: Fields, guessed: dict[str, str]) -> list[str]:
    """Further columns that may be part of a prompt or an answer."""
    known: Iterable[str] = (*PROMPTS, *ANSWERS)
    return [name for name in row if name.lower() in known and name not in guessed.values()]
