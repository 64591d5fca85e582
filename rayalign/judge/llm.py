"""A language model as scorer, which rates replies, or as judge, which compares two: one model, two questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayalign.data.schema import Turns
from rayalign.data.shared_prompt import prompt_text
from rayalign.judge.asking import Ask, Questionnaire
from rayalign.judge.base import refuse_missing_verdicts
from rayalign.judge.endpoint import Endpoint
from rayalign.judge.local import LocalModel
from rayalign.judge.reading import rating, verdict

RATE = """Rate how well the reply answers the request, from 1 (useless) to 10 (could not be better).

Request:
{{ prompt }}

Reply:
{{ reply }}

Explain in one sentence, then write the rating alone in the last line, such as: Rating: 7"""

COMPARE = """Which of two replies answers the request better? Their order and their length say nothing.

Request:
{{ prompt }}

Reply A:
{{ first }}

Reply B:
{{ second }}

Explain in one sentence, then write the verdict alone in the last line: "Verdict: A", "Verdict: B", or "Verdict: tie"
where neither is better."""

MAX_NEW_TOKENS = 512
"""The default for a model that is loaded here."""


class LlmScorer:
    """Ratings of 1 to 10, as :func:`rayalign.judge.reading.rating` reads them.

    Raises:
        UserError: the model cannot be reached (see ``make_ask``), or the template cannot be used.
    """

    def __init__(self, *, template: str | None = None, **where: Any) -> None:
        ask = make_ask("scorer", **where)
        self.questions = Questionnaire(template or RATE, field="scorer", shown=("reply",), ask=ask)
        self.tally = self.questions.tally
        self.remarks = ask.remarks

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Scorer`."""
        rows = [{"prompt": prompt_text(prompt), "reply": reply} for prompt, reply in zip(prompts, replies, strict=True)]
        answers = self.questions.answers(rows, rating)
        return refuse_missing_verdicts(answers.values, answers.problem)


class LlmJudge:
    """Shows every pair in both orders and takes the mean, so that a liking for a place cancels.

    A pair has no verdict unless both orders have one; equal texts tie unasked.

    Raises:
        UserError: the model cannot be reached (see ``make_ask``), or the template cannot be used.
    """

    def __init__(self, *, template: str | None = None, **where: Any) -> None:
        ask = make_ask("judge", **where)
        self.questions = Questionnaire(template or COMPARE, field="judge", shown=("first", "second"), ask=ask)
        self.tally = self.questions.tally
        self.remarks = ask.remarks

    def compare(self, prompts: Sequence[str | Turns], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Judge`."""
        pairs = list(zip(map(prompt_text, prompts), first, second, strict=True))
        different = [place for place, (_, one, other) in enumerate(pairs) if one != other]
        asked = [pairs[place] for place in different]
        rows = [{"prompt": prompt, "first": one, "second": other} for prompt, one, other in asked]
        rows += [{"prompt": prompt, "first": other, "second": one} for prompt, one, other in asked]
        answers = self.questions.answers(rows, verdict)
        here, there = answers.values[: len(different)], answers.values[len(different) :]
        values = [0.5] * len(pairs)
        for place, straight, swapped in zip(different, here, there, strict=True):
            values[place] = (straight + 1 - swapped) / 2
        turned = sum(abs(straight - (1 - swapped)) == 1 for straight, swapped in zip(here, there, strict=True))
        halves = sum(value == 0.5 for value in values)
        self.tally.add(ties=halves - turned, disagreements=turned)
        return refuse_missing_verdicts(values, answers.problem)


def make_ask(
    field: str,
    *,
    model: str,
    base_url: str | None = None,
    engine: str | None = None,
    revision: str | None = None,
    max_new_tokens: int | None = None,
    **of_endpoint: Any,
) -> Ask:
    """What answers: a model behind ``base_url``, or one that ``engine`` loads."""
    if base_url is not None:
        return Endpoint(field=field, model=model, base_url=base_url, max_new_tokens=max_new_tokens, **of_endpoint)
    assert engine is not None
    return LocalModel(
        field=field, model=model, revision=revision, engine=engine, max_new_tokens=max_new_tokens or MAX_NEW_TOKENS
    )
