"""Verdicts on pairs: of a model that is shown both orders, of any scorer, of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from endpoints import KEY_VARIABLE, Endpoint, serving

from rayalign.errors import UserError
from rayalign.judge import make_judge
from rayalign.judge.asking import ATTEMPTS
from rayalign.judge.base import Asked, NoVerdict
from rayalign.judge.llm import LlmJudge
from rayalign.testing import FakeJudge, FakeScorer

PROMPT = ["why?"]
TEMPLATE = "{{ prompt }}|{{ first }}|{{ second }}"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def judge_at(endpoint: Endpoint, **fields: str) -> LlmJudge:
    found = make_judge("llm", model="judge", base_url=endpoint.url, api_key_env=KEY_VARIABLE, **fields)
    assert isinstance(found, LlmJudge)
    return found


def test_a_liking_for_a_place_cancels(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: "Verdict: A"
    judge = judge_at(endpoint)
    assert judge.compare(PROMPT * 3, ["a", "b", "c"], ["x", "y", "z"]) == [0.5, 0.5, 0.5]
    assert judge.tally.asked == Asked(calls=6, disagreements=3)


def test_a_real_preference_survives_both_orders(endpoint: Endpoint) -> None:
    """Prefers the longer reply, wherever it stands; soft where one order says tie."""

    def answer(question: str) -> str:
        _, first, second = question.split("|")
        if {first, second} == {"half", "hal."}:
            return "Verdict: A" if first == "half" else "Verdict: tie"
        return f"Verdict: {'A' if len(first) > len(second) else 'B' if len(first) < len(second) else 'tie'}"

    endpoint.answer = answer
    judge = judge_at(endpoint, template=TEMPLATE)
    first, second = ["long", "no", "even", "half"], ["no", "long", "odd.", "hal."]
    assert judge.compare(PROMPT * 4, first, second) == [1.0, 0.0, 0.5, 0.75]
    assert judge.tally.asked == Asked(calls=8, ties=1)
    assert judge.compare(PROMPT * 4, second, first) == [0.0, 1.0, 0.5, 0.25]
    assert sorted(endpoint.questions[:8]) == sorted(
        f"why?|{one}|{other}" for a, b in zip(first, second, strict=True) for one, other in ((a, b), (b, a))
    )


def test_equal_replies_tie_unasked(endpoint: Endpoint) -> None:
    judge = judge_at(endpoint)
    assert judge.compare(PROMPT * 2, ["same", "same"], ["same", "same"]) == [0.5, 0.5]
    assert judge.tally.asked == Asked(ties=2)
    assert endpoint.seen == []


def test_a_verdict_needs_both_orders(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: "hm" if question == "why?|a|x" else f"Verdict: {'BA'['|x|' not in question]}"
    judge = judge_at(endpoint, template=TEMPLATE)
    with pytest.raises(NoVerdict, match="gave no verdict in 4 attempts") as found:
        judge.compare(PROMPT * 2, ["a", "b"], ["x", "x"])
    assert math.isnan(found.value.values[0]) and found.value.values[1] == 1.0
    assert judge.tally.asked == Asked(calls=4 + ATTEMPTS - 1, failures=ATTEMPTS)


def test_a_judges_template_shows_both_replies(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match=r"judge.template: shows no {{ second }}; it may use {{ prompt }}, {{ first }}"):
        judge_at(endpoint, template="{{ first }}")
    with pytest.raises(UserError, match="judge.api_key_env: NO_SUCH_KEY is not set"):
        make_judge("llm", model="judge", base_url=endpoint.url, api_key_env="NO_SUCH_KEY")


def test_a_function_decides_by_its_scores() -> None:
    judge = make_judge("rule", function="scorers:length")
    assert judge.compare(PROMPT * 3, ["long", "so", "no"], ["so", "long", "ok"]) == [1.0, 0.0, 0.5]
    assert judge.tally.asked == Asked(calls=6, ties=1)
    with pytest.raises(UserError, match="no scorer is called 'oracle'"):
        make_judge("oracle")


def test_a_table_decides_and_leaves_open_what_it_does_not_know() -> None:
    judge = FakeJudge({"good": 2.0, "fair": 1.0, "also fair": 1.0})
    assert judge.compare(PROMPT * 3, ["good", "fair", "fair"], ["fair", "good", "also fair"]) == [1.0, 0.0, 0.5]
    with pytest.raises(NoVerdict, match="the table has no such reply") as found:
        judge.compare(PROMPT * 2, ["good", "unknown"], ["fair", "good"])
    assert found.value.values[0] == 1.0 and math.isnan(found.value.values[1])
    assert judge.tally.asked == Asked(calls=10, failures=1, ties=1)
    scorer = FakeScorer({"good": 2.0})
    assert scorer.score(["why?", "who?"], ["good", "good"]) == [2.0, 2.0]
    assert scorer.seen == [("why?", "good"), ("who?", "good")]
