"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rayalign.errors import UserError, first_line
from rayalign.judge.asking import RETRY_TEMPERATURE, Unanswered
from rayalign.judge.base import ScorerUnusable

CALLS_AT_ONCE = 8
SECONDS = 120.0
WRONG_ADDRESS = (401, 403, 404)


class StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(self, *ignored: Any) -> None:
        return None


class Endpoint:
    """Answers of ``model`` at ``base_url``; see :class:`rayalign.judge.asking.Ask`.

    The key comes from the environment variable ``api_key_env``, and stands in no answer and no error.

    Raises:
        UserError: that variable is not set, or holds what no header can.
    """

    def __init__(self, *, field: str, model: str, base_url: str, api_key_env: str) -> None:
        self.field = field
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.name = f"{model} at {self.url}"
        self.api_key_env = api_key_env
        self.opener = urllib.request.build_opener(StayHere)
        self._key()

    def __call__(self, questions: Sequence[str], *, attempt: int) -> list[str | Unanswered]:
        """See :class:`rayalign.judge.asking.Ask`; several calls at once."""
        if attempt:
            time.sleep(min(8.0, 0.25 * 2.0 ** (attempt - 1)))
        with ThreadPoolExecutor(CALLS_AT_ONCE) as threads:
            return list(threads.map(partial(self._answer, attempt=attempt), questions))

    def _answer(self, question: str, *, attempt: int) -> str | Unanswered:
        try:
            return self._clean(self._post(question, attempt))
        except urllib.error.HTTPError as error:
            if error.code in WRONG_ADDRESS:
                reason = self._clean(str(error.reason))
                raise ScorerUnusable(
                    f"{self.field}: {self.url} answers {error.code} {reason}; check the key and model"
                ) from None
            return Unanswered(self._clean(first_line(error)))
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            return Unanswered(self._clean(first_line(error)))

    def _post(self, question: str, attempt: int) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": RETRY_TEMPERATURE if attempt else 0.0,
            "seed": attempt,
        }
        request = urllib.request.Request(
            self.url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._key()}"},
        )
        with self.opener.open(request, timeout=SECONDS) as response:
            choice = json.load(response)["choices"][0]
        if choice.get("finish_reason") == "length":
            raise ValueError("the answer was cut at the endpoint's limit of tokens")
        return str(choice["message"]["content"])

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"{self.field}.api_key_env: {self.api_key_env} is not set; the key comes from the environment only"
            )
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.field}.api_key_env: {self.api_key_env} holds characters that no key has")
        return key

    def _clean(self, text: str) -> str:
        """A server may repeat the key in what it says."""
        return text.replace(self._key(), "(key)")
