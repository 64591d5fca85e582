"""Questions to a language model, asked until the answer can be read, and counted alike for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jinja2
from jinja2 import meta

from rayalign.errors import UserError
from rayalign.judge.base import Tally
from rayalign.remarks import Remarks

ATTEMPTS = 4
RETRY_TEMPERATURE = 0.7
"""Temperature of every attempt after the first, which is greedy: a repeated answer would be of no use."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A question that got no answer, and why; ``final``: it would get none if it were asked again."""

    reason: str
    final: bool = False


class Ask(Protocol):
    """A model that answers questions."""

    name: str
    """Who answers, for errors: the model and where it is."""
    remarks: Remarks
    """What else there is to tell of it."""

    def __call__(self, questions: Sequence[str], *, attempt: int) -> list[str | Unanswered]:
        """One answer per question, in order; ``attempt`` counts from 0 and seeds the draw.

        Raises:
            ScorerUnusable: there is no point in asking anything.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What was read, NaN where no attempt gave anything, and why of the first such."""

    values: list[float]
    problem: str


class Questionnaire:
    """One question for every row, in the words of a template.

    Args:
        field: the block that has the template, for errors: ``scorer`` or ``judge``.
        shown: variables that the template must show; it may use ``prompt`` too.

    Raises:
        UserError: the template cannot be used.
    """

    def __init__(self, template: str, *, field: str, shown: Sequence[str], ask: Ask) -> None:
        self.ask = ask
        self.tally = Tally()
        self.template = usable_template(template, field=field, shown=shown)

    def answers(self, rows: Sequence[Mapping[str, str]], read: Callable[[str], float | None]) -> Readings:
        """``read`` of the first answer to each row's question that it can read.

        Everything is asked together, and what was not understood is asked together again.
        """
        questions = [self.template.render(row) for row in rows]
        values = [math.nan] * len(rows)
        waiting, lost = list(range(len(rows))), dict[int, str]()
        for attempt in range(ATTEMPTS):
            if not waiting:
                break
            problems: dict[int, Unanswered] = {}
            answers = self.ask([questions[place] for place in waiting], attempt=attempt)
            for place, answer in zip(waiting, answers, strict=True):
                found = None if isinstance(answer, Unanswered) else read(answer)
                if found is not None:
                    values[place] = found
                else:
                    problems[place] = (
                        answer if isinstance(answer, Unanswered) else Unanswered(unreadable_answer(answer))
                    )
            self.tally.add(calls=len(waiting), failures=len(problems))
            waiting = [place for place, problem in problems.items() if not problem.final]
            lost |= {place: f": {problem.reason}" for place, problem in problems.items() if problem.final}
        if waiting:
            lost |= {place: f" in {ATTEMPTS} attempts: {problems[place].reason}" for place in waiting}
        problem = f"{self.ask.name} gave no verdict{lost[min(lost)]}" if lost else ""
        return Readings(values=values, problem=problem)


def unreadable_answer(answer: str) -> str:
    return f"nothing that can be read in {answer[-80:]!r}"


def usable_template(text: str, *, field: str, shown: Sequence[str]) -> jinja2.Template:
    """The template, tried out; raises UserError where it cannot be rendered or leaves out what is to be judged."""
    may_use = ", ".join(f"{{{{ {name} }}}}" for name in ("prompt", *shown))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        template = environment.from_string(text)
        template.render(dict.fromkeys(("prompt", *shown), ""))
        used = meta.find_undeclared_variables(environment.parse(text))
    except Exception as error:  # a template may call anything, and so raise anything
        raise UserError(f"{field}.template: {error}; it may use {may_use}") from error
    missing = [name for name in shown if name not in used]
    if missing:
        raise UserError(f"{field}.template: shows no {{{{ {missing[0]} }}}}; it may use {may_use}")
    return template
