"""What a format is: which columns a row has, and how they become a prompt with its candidates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from rayalign.data.formats.turns import text_or_turns_said
from rayalign.data.schema import (
    MISSING,
    Fields,
    Preference,
    RowProblem,
    Turns,
    assistant,
    is_assistant,
    optional_number,
    required,
    user,
)

Texts = str | Turns
SYSTEM = ("system", "system_prompt")
CONVERSATION = (*SYSTEM, "tools", "functions", "chat_template_kwargs")
"""Columns that every format of conversations may have."""
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
_OTHER_SIDE = {**dict(SCORES), **{rejected: chosen for chosen, rejected in SCORES}}
FINISHED = "finished"
"""Column that says of each sampled answer whether it ended by itself; such an answer may be empty."""
OF_PAIRS = (*SCORES[0], *SCORES[1], "margin", "soft_label")


class Body(NamedTuple):
    """What one format says about one row."""

    prompt: Texts
    candidates: tuple[Texts, ...]
    columns: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    continues: bool = False
    preference: Preference = "stored"
    tools: Any = None
    """Where the format keeps tools elsewhere than in ``tools``."""


def always(_row: Fields) -> bool:
    return True


def never(_row: Fields) -> bool:
    """Found by name alone: its columns are those of other data too."""
    return False


@dataclass(frozen=True, kw_only=True)
class Format:
    """The columns of a row of one kind, and the function that reads them."""

    says: str
    """What such a row is, for people."""
    read: Callable[[Fields], Body]
    needs: tuple[str, ...]
    """Columns that such a row has; ``question|input`` is exactly one of the two."""
    may: tuple[str, ...] = ()
    """Columns that are read where a row has them."""
    leaves: tuple[str, ...] = ()
    """Columns that such data have and that mean nothing for training."""
    verdicts: tuple[str, ...] = ()
    """Needed columns that may be null: the row then states no preference."""
    is_found: Callable[[Fields], bool] = always
    """Whether a row that has these columns is certainly of this kind."""
    ask: str = ""
    """What to write where a row has the columns, and it is not certain what they mean."""
    guesses_prompt: bool = False
    """The prompt is found by elimination: another column that could be it leaves no certainty."""
    is_conversation: bool = True
    """False for raw text, which has no system turn and no tools."""

    @cached_property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """``needs``, of each the columns that it may be."""
        return tuple(tuple(need.split("|")) for need in self.needs)

    @cached_property
    def _sets(self) -> tuple[frozenset[str], ...]:
        return tuple(map(frozenset, self.choices))

    @cached_property
    def reads(self) -> frozenset[str]:
        """Every column that is ever read."""
        return self._besides.union(*self.choices)

    @cached_property
    def _besides(self) -> frozenset[str]:
        return frozenset({*self.may, *(CONVERSATION if self.is_conversation else ())})

    def read_of(self, held: Collection[str]) -> frozenset[str]:
        """The columns of a row that are read: one of every choice."""
        chosen = (next(filter(held.__contains__, choice), "") for choice in self.choices)
        return self._besides.union(chosen)

    def holds(self, row: Collection[str]) -> bool:
        """Whether a row holds any of what the format needs."""
        return any(not choice.isdisjoint(row) for choice in self._sets)

    def fits(self, names: Collection[str]) -> bool:
        """Whether a row with these columns has what the format needs."""
        return all(not choice.isdisjoint(names) for choice in self._sets)


def one_of(row: Fields, *names: str) -> str:
    """The only one of ``names`` that the row has; raises RowProblem where it has none or several."""
    found = [name for name in names if name in row]
    if len(found) > 1:
        raise RowProblem(found[1], f"{found[0]} and {found[1]} could both be meant: name one with `columns`")
    return found[0] if found else names[0]


def aligned(
    prompt: Texts, candidates: Mapping[str, Texts], *, may_be_empty: bool = False
) -> tuple[Texts, tuple[Texts, ...]]:
    """Prompt and candidates as all texts, or else as all turns."""
    if isinstance(prompt, str):
        if all(isinstance(value, str) for value in candidates.values()):
            return prompt, tuple(candidates.values())
        prompt = user(prompt)
    return prompt, tuple(
        turns_after_prompt(prompt, value, name, may_be_empty=may_be_empty) for name, value in candidates.items()
    )


def turns_after_prompt(prompt: Turns, value: Texts, name: str, *, may_be_empty: bool = False) -> Turns:
    """A candidate as the turns that follow the prompt; a whole conversation loses the prompt that it repeats."""
    answer = assistant(value) if isinstance(value, str) else value
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    if not answer or not is_assistant(answer[0]):
        raise RowProblem(name, f"{name} must start with a turn of the assistant, or repeat the prompt before it")
    return ending_in_answer(answer, name, may_be_empty=may_be_empty)


def ending_in_answer(answer: Turns, name: str, *, may_be_empty: bool = False) -> Turns:
    """Turns that end in an answer that says something; ``may_be_empty``: or nothing, as a sample that ended at once."""
    last = answer[-1]
    if not is_assistant(last):
        raise RowProblem(name, f"{name} ends in a turn of {last['role']}: the last turn must be the assistant's")
    if not may_be_empty and not last["content"].strip() and not last.get("tool_calls"):
        raise RowProblem(name, f"{name} is empty: its last turn says nothing")
    return answer


def lone_scores(row: Fields) -> frozenset[str]:
    """Scores of one side whose other side has no column."""
    return frozenset(one for one, other in _OTHER_SIDE.items() if one in row and other not in row)


def pair_columns(row: Fields, *, leaves_lone_scores: bool = False) -> dict[str, tuple[float, ...]]:
    """Scores, margin and soft label of a pair; the score of one side alone is refused, or left."""
    columns: dict[str, tuple[float, ...]] = {}
    lone = lone_scores(row) if leaves_lone_scores else frozenset()
    for chosen, rejected in SCORES:
        if not lone.isdisjoint((chosen, rejected)):
            continue
        if chosen in row or rejected in row:
            required(row, chosen), required(row, rejected)
            scores = (optional_number(row, chosen), optional_number(row, rejected))
            if columns.setdefault("reward", scores) != scores:
                raise RowProblem(chosen, f"{chosen} and {SCORES[0][0]} differ: which are the scores is not certain")
    if "margin" in row:
        columns["margin"] = (optional_number(row, "margin"), MISSING)
    if "soft_label" in row:
        columns["soft_label"] = (optional_number(row, "soft_label"), MISSING)
        if not 0 <= columns["soft_label"][0] <= 1:
            raise RowProblem("soft_label", f"soft_label is {row['soft_label']}: a probability lies in [0, 1]")
    return columns


def comparison_body(
    prompt: Texts, answers: Mapping[str, Texts], *, better: int | None, rewards: Iterable[float] = ()
) -> Body:
    """Two answers, of which ``better`` (0 or 1) is preferred; None: neither is."""
    prompt, (first, second) = aligned(prompt, answers)
    numbers = tuple(rewards)
    if better == 1:
        first, second, numbers = second, first, numbers[::-1]
    columns = {"reward": numbers} if numbers else {}
    return Body(prompt, (first, second), columns, preference="stored" if better is not None else "undecided")


def answer_of(row: Fields, name: str) -> Texts:
    """One answer; a single turn stands for a list of it."""
    value = text_or_turns_said(row, name)
    if not isinstance(value, str) and not is_assistant(value[0]):
        raise RowProblem(name, f"{name} starts with a turn of {value[0]['role']}: it must be the assistant's")
    return value
