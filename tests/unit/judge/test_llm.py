"""Ratings from an endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from endpoints import KEY, KEY_VARIABLE, Endpoint, serving

from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.judge.asking import ATTEMPTS
from rayalign.judge.base import Asked, NoVerdict


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def scorer(endpoint: Endpoint, **fields: str):
    return make_scorer("llm", model="judge", base_url=endpoint.url, api_key_env=KEY_VARIABLE, **fields)


def test_every_reply_is_rated_with_the_key_from_the_environment(endpoint: Endpoint) -> None:
    judge = scorer(endpoint)
    assert judge.score(["why?"] * 5, ["because", "so", "<b>", "7", "no"]) == [7.0] * 5
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert "why?" in endpoint.questions[0] and endpoint.seen[0]["temperature"] == 0.0
    assert judge.tally.asked == Asked(calls=5)


def test_what_fails_is_asked_again_and_counted(endpoint: Endpoint) -> None:
    endpoint.script = ["", "no idea", "Rating: 4"]
    judge = scorer(endpoint)
    assert judge.score(["why?"], ["because"]) == [4.0]
    assert judge.tally.asked == Asked(calls=3, failures=2)
    assert [body["seed"] for body in endpoint.seen] == [0, 1, 2]
    assert [body["temperature"] for body in endpoint.seen] == [0.0, 0.7, 0.7]


def test_many_at_once_are_counted_exactly(endpoint: Endpoint) -> None:
    """Every fifth question is answered with its third attempt only: 60 · 1 + 12 · 2 calls, 24 of them failures."""

    def answer(question: str) -> str:
        number = int(question.split("#")[1].split()[0])
        attempts = sum(f"#{number} " in earlier for earlier in endpoint.questions)
        return "no idea" if number % 5 == 0 and attempts < 3 else f"Rating: {1 + number % 10}"

    endpoint.answer = answer
    judge = scorer(endpoint, template="{{ prompt }} #{{ reply }} ")
    assert judge.score(["why?"] * 60, [str(number) for number in range(60)]) == [1 + n % 10 for n in range(60)]
    assert judge.tally.asked == Asked(calls=84, failures=24)


def test_no_verdict_is_no_number_and_the_others_are_kept(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: "no idea" if "second" in question else "Rating: 3"
    judge = scorer(endpoint)
    with pytest.raises(NoVerdict, match=r"judge at http://.*/v1/chat/completions gave no verdict in 4 ") as found:
        judge.score(["why?"] * 3, ["first", "second", "third"])
    assert "nothing that can be read in 'no idea'" in str(found.value)
    assert found.value.values[::2] == (3.0, 3.0) and math.isnan(found.value.values[1])
    assert judge.tally.asked == Asked(calls=2 + ATTEMPTS, failures=ATTEMPTS)


@pytest.mark.parametrize("step", [400, f"I was called with {KEY}"])
def test_a_server_that_repeats_the_key_does_not_show_it(endpoint: Endpoint, step: int | str) -> None:
    endpoint.answer = lambda question: step
    with pytest.raises(NoVerdict, match=r"\(key\)") as caught:
        scorer(endpoint).score(["why?"], ["because"])
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_carries_the_key_elsewhere(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda question: status
    with pytest.raises(UserError, match=f"answers {status} .*, to /elsewhere"):
        scorer(endpoint).score(["why?"], ["because"])
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [("", "is not set"), ("  ", "is not set"), ("sk-\nx", "holds characters that no key has"), ("sk-é", "no key has")],
)
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, key: str, message: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UserError, match=message) as caught:
        make_scorer("llm", model="judge", base_url="http://127.0.0.1:9", api_key_env=KEY_VARIABLE)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ answer }}", "'answer' is undefined; it may use {{ prompt }}, {{ reply }}"),
        ("{{ prompt }}", "shows no {{ reply }}"),
        ("{{ reply", "unexpected end of template"),
        ("{{ reply }}{{ 1 // 0 }}", "division"),
        ("{{ reply }}{% include 'other' %}", "no loader"),
    ],
)
def test_templates_are_tried_at_once(endpoint: Endpoint, template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        scorer(endpoint, template=template)
    assert str(caught.value).startswith("scorer.template: ") and message in str(caught.value)


def test_a_template_is_the_question(endpoint: Endpoint) -> None:
    scorer(endpoint, template="{{ prompt }}|{{ reply }}").score([[{"role": "user", "content": "{{ a }}"}]], ["b"])
    assert endpoint.questions == ["{{ a }}|b"]


def test_a_key_is_needed(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match="scorer.api_key_env: NO_SUCH_KEY is not set"):
        make_scorer("llm", model="judge", base_url="http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")
