"""Ratings from an endpoint that speaks OpenAI's protocol: a real HTTP server that misbehaves as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.judge.llm import ATTEMPTS, NoVerdict, rating

KEY = "sk-not-to-be-seen"


class Endpoint(ThreadingHTTPServer):
    """Answers from a script: a status, or the text of the reply; then 7 for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[int | str] = []
        self.seen: list[dict[str, object]] = []
        self.keys: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        self.server.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.add(self.headers["Authorization"])
        step = self.server.script.pop(0) if self.server.script else "Rating: 7"
        if isinstance(step, int):
            return self.send_error(step)
        body = json.dumps({"choices": [{"message": {"content": step}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr("rayalign.judge.llm.time.sleep", lambda seconds: None)
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def scorer(endpoint: Endpoint, **fields: str):
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    return make_scorer("llm", model="judge", base_url=url, api_key_env="TEST_KEY", **fields)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is good.\nRating: 7", 7.0),
        ("**Rating: 8**", 8.0),
        ("rating = 6.5.", 6.5),
        ("9/10", 9.0),
        ("3", 3.0),
        ("I would give 2 of 5 points for style, and so: Rating: 10", 10.0),
        ("Rating: 11", None),
        ("Rating: 0", None),
        ("it is a 7, I think, or so", None),
        ("", None),
    ],
)
def test_the_verdict_is_the_number_that_the_answer_ends_in(answer: str, expected: float | None) -> None:
    assert rating(answer) == expected


def test_every_reply_is_rated_with_the_key_from_the_environment(endpoint: Endpoint) -> None:
    judge = scorer(endpoint)
    assert judge.score(["why?"] * 5, ["because", "so", "<b>", "7", "no"]) == [7.0] * 5
    assert endpoint.keys == {f"Bearer {KEY}"}
    asked = str(endpoint.seen[0]["messages"])
    assert "why?" in asked and endpoint.seen[0]["temperature"] == 0.0
    assert (judge.calls, judge.failures) == (5, 0)


def test_what_fails_is_asked_again_and_counted(endpoint: Endpoint) -> None:
    endpoint.script = [500, "no idea", "Rating: 4"]
    judge = scorer(endpoint)
    assert judge.score(["why?"], ["because"]) == [4.0]
    assert (judge.calls, judge.failures) == (3, 2)
    assert [body["seed"] for body in endpoint.seen] == [0, 1, 2]


def test_no_verdict_is_no_number(endpoint: Endpoint) -> None:
    endpoint.script = ["no idea"] * ATTEMPTS
    with pytest.raises(NoVerdict, match=r"judge gave no verdict in 4 attempts: no rating in 'no idea'"):
        scorer(endpoint).score(["why?"], ["because"])


def test_a_wrong_key_ends_it_without_showing_it(endpoint: Endpoint) -> None:
    endpoint.script = [401]
    with pytest.raises(UserError, match="answers 401 .*; check the key and model") as caught:
        scorer(endpoint).score(["why?"], ["because"])
    assert KEY not in str(caught.value)


def test_templates_and_keys_are_checked_at_once(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        make_scorer("llm", model="judge", base_url="http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")
    with pytest.raises(UserError, match=r"scorer.template: 'answer' is undefined"):
        scorer(endpoint, template="{{ answer }}")
    judge = scorer(endpoint, template="{{ prompt }}|{{ reply }}")
    judge.score([[{"role": "user", "content": "a"}]], ["b"])
    assert endpoint.seen[0]["messages"] == [{"role": "user", "content": "a|b"}]
