"""A scorer that is a language model behind an OpenAI-compatible endpoint: it is asked for a rating."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from rayalign.data.schema import Turns
from rayalign.data.split import prompt_text
from rayalign.errors import UserError, first_line
from rayalign.judge.base import ScorerUnusable

TEMPLATE = """Rate how well the reply answers the request, from 1 (useless) to 10 (could not be better).

Request:
{{ prompt }}

Reply:
{{ reply }}

Explain in one sentence, then write the rating alone in the last line, such as: Rating: 7"""

RATING = re.compile(r"(?:rating\s*[:=]\s*\**\s*)?(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*\Z", re.IGNORECASE)
ATTEMPTS = 4
CALLS_AT_ONCE = 8
SECONDS = 120.0


class NoVerdict(Exception):
    """The endpoint answered nothing that can be read as a rating, however often it was asked."""


class LlmScorer:
    """Ratings of 1 to 10; the answer's last number is the verdict.

    ``calls`` and ``failures`` count what was asked and what had to be asked again.

    Raises:
        UserError: the key's environment variable is not set, or the template cannot be used.
    """

    def __init__(
        self, *, model: str, base_url: str, api_key_env: str = "OPENAI_API_KEY", template: str | None = None
    ) -> None:
        if api_key_env not in os.environ:
            raise UserError(f"scorer.api_key_env: {api_key_env} is not set; the key comes from the environment only")
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.api_key_env = api_key_env
        try:
            self.template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template or TEMPLATE)
            self.template.render(prompt="", reply="")
        except jinja2.TemplateError as error:
            raise UserError(f"scorer.template: {error}; it may use {{{{ prompt }}}} and {{{{ reply }}}}") from error
        self.calls = 0
        self.failures = 0

    def score(self, prompts: Sequence[str | Turns], replies: Sequence[str]) -> list[float]:
        """See :class:`rayalign.judge.base.Scorer`; raises NoVerdict where there is none after four attempts."""
        questions = [
            self.template.render(prompt=prompt_text(prompt), reply=reply)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        with ThreadPoolExecutor(CALLS_AT_ONCE) as threads:
            return list(threads.map(self._rating, questions))

    def _rating(self, question: str) -> float:
        problem = ""
        for attempt in range(ATTEMPTS):
            self.calls += 1
            try:
                answer = self._ask(question, seed=attempt)
            except UserError:
                raise
            except (OSError, ValueError, KeyError, IndexError) as error:
                problem = first_line(error)
                time.sleep(min(8.0, 0.25 * 2**attempt) if attempt + 1 < ATTEMPTS else 0.0)
            else:
                found = rating(answer)
                if found is not None:
                    return found
                problem = f"no rating in {answer[-80:]!r}"
            self.failures += 1
        raise NoVerdict(f"{self.model} gave no verdict in {ATTEMPTS} attempts: {problem}")

    def _ask(self, question: str, *, seed: int) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0 if seed == 0 else 0.7,  # the same answer again would be of no use
            "seed": seed,
        }
        request = urllib.request.Request(
            self.url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ[self.api_key_env]}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise ScorerUnusable(
                    f"scorer: {self.url} answers {error.code} {error.reason}; check the key and model"
                ) from error
            raise


def rating(answer: str) -> float | None:
    """The number that an answer ends in, if it is a rating from 1 to 10."""
    found = RATING.search(answer.strip())
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None
