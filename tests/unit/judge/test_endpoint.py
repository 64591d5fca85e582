"""An endpoint that is busy, away, refuses, or answers something else: what is asked again, when, and what is said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from endpoints import KEY, KEY_VARIABLE, NOON, Endpoint, Reply, Step, http_date, serving

from rayalign.judge import make_scorer
from rayalign.judge.base import NoVerdict, ScorerUnusable
from rayalign.judge.patience import Patience, retry_after

TEXT = {"Content-Type": "text/plain"}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


def scorer(endpoint: Endpoint, **fields: Any) -> Any:
    return make_scorer("llm", model="judge", base_url=endpoint.url, api_key_env=KEY_VARIABLE, **fields)


def failure(endpoint: Endpoint, kind: type[Exception], **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        scorer(endpoint, **fields).score(["why?"], ["because"])
    assert KEY not in str(caught.value)
    return str(caught.value)


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 529])
def test_an_overload_of_minutes_loses_nothing(endpoint: Endpoint, status: int) -> None:
    endpoint.busy_until(300.0, status)
    found = scorer(endpoint, concurrency=1)
    assert found.score(["why?"] * 4, ["a", "b", "c", "d"]) == [7.0] * 4
    assert 300 <= endpoint.clock.now() <= 330 and len(endpoint.seen) < 4 + 30
    (told,) = found.remarks.take()
    assert f"was waited for: it answers {status} no, Bearer (key)" in told


def test_many_at_once_wait_too(endpoint: Endpoint) -> None:
    endpoint.busy_until(300.0, 503)
    found = scorer(endpoint, retry_seconds=86_400.0)  # in this time threads wait one after the other
    assert found.score(["why?"] * 40, [str(number) for number in range(40)]) == [7.0] * 40


def test_it_is_asked_ever_more_rarely(endpoint: Endpoint) -> None:
    endpoint.busy_until(120.0, 503)
    assert scorer(endpoint).score(["why?"], ["because"]) == [7.0]
    waits = [later - earlier for earlier, later in zip(endpoint.times, endpoint.times[1:], strict=False)]
    for number, wait in enumerate(waits):
        longest = min(30.0, 0.5 * 2**number)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "20"}, 20.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": http_date(NOON + 40)}, 40.0),
        ({"Retry-After": http_date(NOON + 3640), "Date": http_date(NOON + 3600)}, 40.0),  # its clock is an hour off
        ({"Retry-After": http_date(NOON - 40)}, 0.0),
        ({"retry-after-ms": "2500"}, 2.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": ""}, None),
        ({}, None),
    ],
)
def test_it_is_asked_again_when_it_says(endpoint: Endpoint, headers: dict[str, str], seconds: float | None) -> None:
    lower = {name.lower(): value for name, value in {"Date": http_date(NOON), **headers}.items()}
    assert retry_after(lower, NOON) == seconds
    endpoint.script = [Reply(429, error("slow down"), headers)]
    assert scorer(endpoint).score(["why?"], ["because"]) == [7.0]
    first, second = endpoint.times
    assert (seconds or 0.0) <= second - first <= (seconds or 0.0) + 1.0


def test_what_it_asks_of_one_thread_all_heed(endpoint: Endpoint) -> None:
    """Three calls a minute: others wait as well, and every question is answered."""
    allowed = [0.0]

    def answer(question: str) -> Step:
        now = endpoint.clock.now()
        if now < allowed[0]:
            return Reply(429, error("rate limit"), {"Retry-After": f"{allowed[0] - now:.3f}"})
        allowed[0] = now + 20.0
        return "Rating: 7"

    endpoint.answer = answer
    found = scorer(endpoint, retry_seconds=300.0)  # the clock adds up what eight threads wait side by side
    assert found.score(["why?"] * 30, [f"because {n}" for n in range(30)]) == [7.0] * 30
    assert endpoint.clock.now() >= 29 * 20.0  # far longer than a call is repeated while nothing is answered
    assert found.tally.asked.failures == 0


def test_one_that_stays_away_ends_it(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: Reply(503, error("model is loading"))
    said = failure(endpoint, ScorerUnusable, retry_seconds=100.0)
    assert said.startswith(f"scorer: {endpoint.url}/chat/completions gives no answer: it answers 503 model is loading")
    assert "raise scorer.retry_seconds; the same command continues" in said
    assert 60 <= endpoint.clock.now() <= 100


def test_one_that_asks_for_too_much_patience_ends_it_at_once(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: Reply(429, error("tomorrow"), {"Retry-After": "86400"})
    assert "it answers 429 tomorrow, and asks for 86400 s; asked 1 times" in failure(endpoint, ScorerUnusable)
    assert endpoint.clock.now() == 0.0


def test_an_address_where_nobody_answers_is_given_up_after_a_minute(endpoint: Endpoint) -> None:
    found = make_scorer("llm", model="judge", base_url="http://127.0.0.1:9/v1", api_key_env=KEY_VARIABLE)
    with pytest.raises(
        ScorerUnusable, match=r"no response \(.*refused\).*Check base_url, and whether that server runs"
    ):
        found.score(["why?"], ["because"])
    assert 30 <= endpoint.clock.now() <= 60


@pytest.mark.parametrize("address", ["http://no-such-host.invalid/v1", "http://127.0.0.1:9 9/v1", "https://127.0.0.1"])
def test_an_address_that_cannot_be_right_is_given_up_at_once(endpoint: Endpoint, address: str) -> None:
    if address.startswith("https"):  # a server that speaks no TLS
        address = endpoint.url.replace("http:", "https:")
    found = make_scorer("llm", model="judge", base_url=address, api_key_env=KEY_VARIABLE)
    with pytest.raises(ScorerUnusable, match="scorer.base_url: http"):
        found.score(["why?"], ["because"])
    assert endpoint.clock.now() <= 60


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, error("Incorrect API key provided"), "answers 401 Incorrect API key provided; check the key"),
        (402, error("insufficient credit"), "answers 402 insufficient credit; the account cannot pay for it"),
        (403, {"detail": "your plan has no such model"}, "answers 403 your plan has no such model; check the key, and"),
        (404, {"message": "no model judge"}, "answers 404 no model judge; check base_url and model"),
        (404, "<html>a page</html>", "answers 404 Not Found; check base_url and model"),
        (405, "", "answers 405 Method Not Allowed; check base_url"),
        (308, "", "answers 308 Permanent Redirect, to /elsewhere; base_url is to be the address itself"),
        (429, error("quota", code="insufficient_quota"), "answers 429 quota; the account cannot pay for it"),
    ],
)
def test_what_every_question_would_get_ends_it(
    endpoint: Endpoint, status: int, body: str | dict[str, Any], expected: str
) -> None:
    headers = {"Content-Type": "text/html" if isinstance(body, str) else "application/json", "Location": "/elsewhere"}
    endpoint.answer = lambda question: Reply(status, body, headers)
    assert f"scorer: {endpoint.url}/chat/completions {expected}" in failure(endpoint, ScorerUnusable)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, error("maximum context length is 8192 tokens"), "it answers 400 maximum context length is 8192 tokens"),
        (413, "too much", "it answers 413 too much"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "too long"}]}, "it answers 422 [{"),
        (403, error("your input was flagged by moderation"), "it answers 403 your input was flagged by moderation"),
        (400, f"called with Bearer {KEY}", "it answers 400 called with Bearer (key)"),
        (400, error("x" * 299 + KEY), "it answers 400 " + "x" * 299 + "(…"),  # nor half of it, where it is cut
    ],
)
def test_what_is_wrong_with_one_question_is_said_and_not_asked_again(
    endpoint: Endpoint, status: int, body: str | dict[str, Any], expected: str
) -> None:
    endpoint.answer = lambda question: Reply(status, body, TEXT) if "second" in question else "Rating: 3"
    with pytest.raises(NoVerdict) as caught:
        scorer(endpoint).score(["why?"] * 3, ["first", "second", "third"])
    assert caught.value.values[::2] == (3.0, 3.0)
    assert f"gave no verdict: {expected}" in str(caught.value) and KEY[:6] not in str(caught.value)
    assert len(endpoint.seen) == 3


def test_a_fault_of_one_question_does_not_hold_up_the_others(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: 500 if "second" in question else "Rating: 3"
    with pytest.raises(NoVerdict, match="gave no verdict: it answers 500 .*; asked 6 times") as caught:
        scorer(endpoint, concurrency=2).score(["why?"] * 9, ["second", *"abcdefgh"])
    assert caught.value.values[1:] == (3.0,) * 8
    assert endpoint.clock.now() < 60


@pytest.mark.parametrize(
    ("refusal", "status", "refused"),
    [
        (
            error(
                "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
                "supported.",
                param="temperature",
                code="unsupported_value",
            ),
            400,
            "temperature",
        ),
        (error("Unsupported parameter: 'seed'"), 400, "seed"),
        ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
         422, "seed"),
        (error("extra fields not permitted: temperature"), 422, "temperature"),
        (error("`temperature` is deprecated for this model."), 400, "temperature"),
        (
            error(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                "instead.",
                param="max_tokens",
            ),
            400,
            "max_tokens",
        ),
        (error("Unknown name \"max_tokens\": Cannot find field."), 400, "max_tokens"),
    ],
)  # fmt: skip
def test_a_parameter_that_it_refuses_is_left_out_once_and_for_all(
    endpoint: Endpoint, refusal: dict[str, Any], status: int, refused: str
) -> None:
    def answer(question: str) -> Step:
        return Reply(status, refusal) if refused in endpoint.seen[-1] else "Rating: 7"

    endpoint.answer = answer
    found = scorer(endpoint, max_new_tokens=100, concurrency=1)
    assert found.score(["why?"] * 3, ["a", "b", "c"]) == [7.0] * 3
    assert found.score(["why?"], ["d"]) == [7.0]
    assert [refused in body for body in endpoint.seen] == [True, False, False, False, False]
    others = {"temperature": 0.0, "seed": 0, "max_tokens": 100}
    others.pop(refused)
    expected = others | ({"max_completion_tokens": 100} if refused == "max_tokens" else {})
    assert {key: endpoint.seen[-1][key] for key in endpoint.seen[-1] if key not in ("model", "messages")} == expected
    (told,) = found.remarks.take()
    assert told.startswith(f"scorer: judge refuses {refused}, and it ")
    assert found.tally.asked.failures == 0


def test_one_that_refuses_everything_is_asked_with_nothing(endpoint: Endpoint) -> None:
    def answer(question: str) -> Step:
        names = [name for name in endpoint.seen[-1] if name not in ("model", "messages")]
        return Reply(400, error("no", param=names[0])) if names else "Rating: 7"

    endpoint.answer = answer
    assert scorer(endpoint, max_new_tokens=100, concurrency=1).score(["why?"], ["because"]) == [7.0]
    assert [len(body) - 2 for body in endpoint.seen] == [3, 2, 1, 1, 0]


def test_one_that_insists_on_a_temperature_of_1_gets_it(endpoint: Endpoint) -> None:
    refusal = error("Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported.")

    def answer(question: str) -> Step:
        return "Rating: 7" if endpoint.seen[-1].get("temperature") == 1 else Reply(400, refusal)

    endpoint.answer = answer
    assert scorer(endpoint, concurrency=1).score(["why?"] * 2, ["a", "b"]) == [7.0] * 2
    assert [body.get("temperature") for body in endpoint.seen] == [0.0, None, 1.0, 1.0]


def test_half_a_character_of_an_error_can_be_written(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: Reply(400, '{"error": {"message": "cut here: \\ud83d"}}')
    said = failure(endpoint, NoVerdict)
    assert said.encode().endswith(rb"it answers 400 cut here: \ud83d")


def test_a_refusal_that_names_no_parameter_is_said(endpoint: Endpoint) -> None:
    endpoint.answer = lambda question: Reply(400, error("the temperature of the data centre is too high"))
    assert "it answers 400 the temperature of the data centre is too high" in failure(endpoint, NoVerdict)
    assert len(endpoint.seen) == 1


def answer_of(content: object, **message: object) -> dict[str, Any]:
    return {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (answer_of("Rating: 7"), 7.0),
        (answer_of("<think>a 3, or so</think>\nRating: 7"), 7.0),
        (answer_of([{"type": "text", "text": "Rating: "}, {"type": "text", "text": "7"}]), 7.0),
        (answer_of(None), "the answer is empty"),
        (answer_of(""), "the answer is empty"),
        (answer_of([{"type": "image_url"}]), "the answer is empty"),
        (answer_of(None, refusal="I will not"), "the model refuses to answer: 'I will not'"),
        (answer_of(None, reasoning_content="Rating: 7"), "the answer is a thought with nothing after it"),
        ({"choices": [{"finish_reason": "length", "message": {"content": "Rating: 1"}}]}, "was cut at a limit of tok"),
        ({"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]}, "filter took the answer away"),
        ({}, "its answer holds no message: '{}'"),
        ({"choices": []}, "its answer holds no message"),
        ({"choices": None}, "its answer holds no message"),
        ({"choices": [None]}, "its answer holds no message"),
        ({"choices": [{"message": None}]}, "its answer holds no message"),
        ({"choices": [{"message": "Rating: 7"}]}, "its answer holds no message"),
        (error("the model is gone"), "it answers an error: the model is gone"),
        ({"error": "no such model"}, "it answers an error: no such model"),
        ("Rating: 7", "it answers application/json that is not the JSON of an answer: 'Rating: 7'"),
        ("[]", "that is not the JSON of an answer: '[]'"),
        ('{"choices": [{"mess', "that is not the JSON of an answer"),
        (b"\xff\xfe", "that is not the JSON of an answer"),
        ("", "that is not the JSON of an answer: ''"),
        (Reply(body="<html>gateway</html>", headers={"Content-Type": "text/html; charset=utf-8"}), "it answers text/h"),
        (
            Reply(body='data: {"choices":[]}\n\ndata: [DONE]', headers={"Content-Type": "text/event-stream"}),
            "it answers text/event-stream that is not the JSON of an answer: 'data: {",
        ),
    ],
)
def test_a_body_is_an_answer_or_a_reason(
    endpoint: Endpoint, body: Reply | bytes | str | dict[str, Any], expected: float | str
) -> None:
    endpoint.answer = lambda question: body if isinstance(body, Reply) else Reply(body=body)
    if isinstance(expected, float):
        assert scorer(endpoint).score(["why?"], ["because"]) == [expected]
        return
    said = failure(endpoint, NoVerdict)
    assert "gave no verdict in 4 attempts: " in said and expected in said
    assert len(endpoint.seen) == 4


@pytest.mark.parametrize(
    "step",
    [
        Reply(body=answer_of("Rating: 3"), cut=10),
        Reply(body=answer_of("Rating: 3"), seconds=200.0),
        Reply(body=error("overloaded", code=503)),
    ],
    ids=["cut short", "slower than a call may be", "an error of the server behind it"],
)
def test_what_may_pass_is_asked_again(endpoint: Endpoint, step: Reply) -> None:
    endpoint.script = [step]
    found = scorer(endpoint)
    assert found.score(["why?"], ["because"]) == [7.0]
    assert [body["seed"] for body in endpoint.seen] == [0, 0]
    assert found.tally.asked.calls == 1


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_calls_at_once_than_allowed(endpoint: Endpoint, concurrency: int) -> None:
    found = scorer(endpoint, concurrency=concurrency)
    assert found.score(["why?"] * 30, [str(n) for n in range(30)]) == [7.0] * 30
    assert endpoint.most_at_once <= concurrency


def test_waits_are_spread(endpoint: Endpoint) -> None:
    patience = Patience(seconds=600.0, unknown_seconds=60.0, clock=endpoint.clock, random=random.Random(0))
    delays = {round(patience.delay(5, None), 3) for _ in range(20)}
    assert len(delays) == 20 and all(4.0 <= delay <= 8.0 for delay in delays)
