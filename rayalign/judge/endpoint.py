"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rayalign.errors import UserError, first_line
from rayalign.judge.asking import RETRY_TEMPERATURE, Unanswered
from rayalign.judge.base import ScorerUnusable
from rayalign.judge.chat_api import (
    BUSY,
    Busy,
    NoAnswer,
    Response,
    asks_for_the_default,
    refused_parameter,
    text_of,
)
from rayalign.judge.patience import Patience, retry_after
from rayalign.remarks import Remarks

UNKNOWN_SECONDS = 60.0
"""How long an endpoint is waited for that has never said anything: its address may be wrong."""
FAULTS_OF_ONE = 6
"""Times that 500 is an answer to one question while others are answered, before that question is given up."""
WRONG = {
    401: "check the key",
    402: "the account cannot pay for it",
    403: "check the key, and what it may use",
    404: "check base_url and model",
    405: "check base_url",
}
"""Statuses that every question would get, and what to do."""
EXHAUSTED = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting helps."""
MODERATION = re.compile(r"flagged|moderation|content.policy|safety", re.IGNORECASE)
"""In a 403 that is about one question."""
LENGTHS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": None}
"""What is tried in the place of a refused name."""
MOST_BYTES = 16 * 2**20


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *ignored: Any) -> None:
        return None


class Endpoint:
    """Answers of ``model`` at ``base_url``; see :class:`rayalign.judge.asking.Ask`.

    The key comes from the environment variable ``api_key_env``, and stands in no answer and no error. While the
    endpoint is busy or away, calls are made again for ``retry_seconds``, as late as it asks for. Parameters that it
    refuses are left out, which ``remarks`` tells.

    Raises:
        UserError: that variable is not set, or holds what no header can.
    """

    def __init__(
        self,
        *,
        field: str,
        model: str,
        base_url: str,
        api_key_env: str = "OPENAI_API_KEY",
        max_new_tokens: int | None = None,
        timeout_seconds: float = 120.0,
        retry_seconds: float = 600.0,
        concurrency: int = 8,
    ) -> None:
        self.field = field
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.name = f"{model} at {self.url}"
        self.api_key_env = api_key_env
        self.max_new_tokens = max_new_tokens
        self.timeout_seconds = timeout_seconds
        self.concurrency = concurrency
        self.patience = Patience(seconds=retry_seconds, unknown_seconds=UNKNOWN_SECONDS)
        self.remarks = Remarks()
        self.taken: dict[str, str | None] = {}
        """Parameters that the endpoint refuses → what it takes in their place."""
        self.insisted: dict[str, float] = {}
        """Parameters that it requires, although it takes one value only."""
        self.lock = threading.Lock()
        self.opener = urllib.request.build_opener(StayHere)
        self._key()

    def __call__(self, questions: Sequence[str], *, attempt: int) -> list[str | Unanswered]:
        """See :class:`rayalign.judge.asking.Ask`; several calls at once, and none any more once one is hopeless."""
        threads = ThreadPoolExecutor(self.concurrency)
        try:
            return list(threads.map(partial(self._answer, attempt=attempt), questions))
        except UserError:
            self.patience.given_up.set()
            raise
        finally:
            threads.shutdown(cancel_futures=True)
            self.patience.given_up.clear()

    def _answer(self, question: str, *, attempt: int) -> str | Unanswered:
        patience = self.patience
        began, tries = patience.clock.now(), 0
        while True:
            patience.hold()
            tries += 1
            try:
                text = self._asked(question, attempt)
            except NoAnswer as nothing:
                return Unanswered(str(nothing), final=nothing.final)
            except Busy as busy:
                delay = patience.delay(tries, busy.after)
                alone = busy.status == 500 and tries >= FAULTS_OF_ONE and patience.answered > began
                if alone or patience.is_over(began, delay):
                    return self._given_up(began, tries, busy)
                self.remarks.add(f"{self.field}: {self.url} was waited for: {busy}")
                patience.wait(delay)
            else:
                patience.answered = patience.clock.now()
                return text

    def _given_up(self, began: float, tries: int, busy: Busy) -> Unanswered:
        """Raises ScorerUnusable unless others were answered meanwhile: then it is this question's misfortune."""
        said = f"{busy}; asked {tries} times in {self.patience.clock.now() - began:.0f} s"
        if self.patience.answered > began:
            return Unanswered(said, final=True)
        look = f"Look at that server, or raise {self.field}.retry_seconds"
        if not self.patience.reached:
            look = "Check base_url, and whether that server runs"
        raise ScorerUnusable(f"{self.field}: {self.url} gives no answer: {said}. {look}; the same command continues")

    def _asked(self, question: str, attempt: int) -> str:
        """The answer's text.

        Raises:
            Busy, NoAnswer: there is none.
            ScorerUnusable: no question would get one.
        """
        while True:
            parameters = self._parameters(attempt)
            body = {"model": self.model, "messages": [{"role": "user", "content": question}], **parameters}
            response = self._post(json.dumps(body).encode())
            self.patience.reached = True
            if response.status in (400, 422) and self._leaves_out(response, parameters):
                continue
            self._refuse_failure(response)
            return text_of(response)

    def _parameters(self, attempt: int) -> dict[str, Any]:
        """The optional ones, by the names that the endpoint takes."""
        wanted: dict[str, Any] = {"temperature": RETRY_TEMPERATURE if attempt else 0.0, "seed": attempt}
        if self.max_new_tokens is not None:
            wanted["max_tokens"] = self.max_new_tokens
        named: dict[str, Any] = {}
        for name, value in wanted.items():
            taken: str | None = name
            while taken is not None and taken in self.taken:
                taken = self.taken[taken]
            if taken is not None:
                named[taken] = value
        return named | self.insisted

    def _leaves_out(self, response: Response, sent: Mapping[str, Any]) -> bool:
        """Whether a response refuses a parameter; it is left out, or called otherwise, from now on."""
        name = refused_parameter(response, sent)
        if name is None:
            insists = asks_for_the_default(response, sent)
            self.insisted = {"temperature": 1.0} if insists else self.insisted
            return insists
        with self.lock:
            known = name in self.taken
            self.taken[name] = LENGTHS.get(name)
        if not known:
            instead = f"it gets {self.taken[name]} instead" if self.taken[name] else "it is left out"
            self.remarks.add(f"{self.field}: {self.model} refuses {name}, and {instead}: {response.said()}")
        return True

    def _refuse_failure(self, response: Response) -> None:
        """Raise what the status says, if it is no success."""
        status = response.status
        if status == 200:
            return
        what = f"answers {status} {response.said()}"
        if status == 429 and response.code() in EXHAUSTED:
            raise ScorerUnusable(f"{self.field}: {self.url} {what}; {WRONG[402]}")
        if status in BUSY:
            after = retry_after(response.headers, self.patience.clock.date())
            asks = f", and asks for {after:.0f} s" if after else ""
            raise Busy(f"it {what}{asks}", after=after, status=status)
        if status in WRONG and not (status == 403 and MODERATION.search(response.text)):
            raise ScorerUnusable(f"{self.field}: {self.url} {what}; {WRONG[status]}")
        if 300 <= status < 400:
            place = response.shown(response.headers.get("location", "elsewhere"))
            raise ScorerUnusable(f"{self.field}: {self.url} {what}, to {place}; base_url is to be the address itself")
        raise NoAnswer(f"it {what}", final=True)

    def _post(self, body: bytes) -> Response:
        """The server's response; raises Busy where there is none, and ScorerUnusable where there can be none."""
        request = urllib.request.Request(
            self.url,
            data=body,
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._key()}"},
        )
        end = self.patience.clock.now() + self.timeout_seconds
        try:
            try:
                with self.opener.open(request, timeout=self.timeout_seconds) as found:
                    return self._whole(found, end)
            except urllib.error.HTTPError as found:
                with found:
                    return self._whole(found, end)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            self.patience.reached |= cause is error  # a request that was sent failed later: somebody is there
            words = (first_line(cause) if isinstance(cause, BaseException) else cause).replace(self._key(), "(key)")
            if self._is_wrong(cause):
                raise ScorerUnusable(f"{self.field}.base_url: {self.url}: {words}") from None
            raise Busy(f"no response ({words})") from None

    def _is_wrong(self, cause: object) -> bool:
        """Whether no waiting helps: there is no such host, or it is not the one that it says it is."""
        if isinstance(cause, http.client.InvalidURL | ssl.SSLCertVerificationError):
            return True
        if isinstance(cause, socket.gaierror):
            return cause.errno == socket.EAI_NONAME and not self.patience.reached
        return isinstance(cause, ssl.SSLError) and not self.patience.reached

    def _whole(self, found: Any, end: float) -> Response:
        """Read to the end, unless that takes longer than a call may, or there is no end."""
        parts, size = [], 0
        while part := found.read1(65_536):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise NoAnswer(f"its answer is longer than {MOST_BYTES:,} bytes")
            if self.patience.clock.now() > end:
                raise TimeoutError(f"the answer did not end within {self.timeout_seconds:g} s")
        wanted = found.headers.get("Content-Length", "")
        if wanted.isdigit() and size < int(wanted):
            raise http.client.IncompleteRead(b"", int(wanted) - size)
        headers = {name.lower(): value for name, value in found.headers.items()}
        return Response(
            status=found.status, phrase=str(found.reason), headers=headers, body=b"".join(parts), secret=self._key()
        )

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"{self.field}.api_key_env: {self.api_key_env} is not set; the key comes from the environment only"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.field}.api_key_env: {self.api_key_env} holds characters that no key has")
        return key
