"""What a language model's answer says: a rating from 1 to 10, or a verdict. What is not certain is not read."""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import islice
from typing import Any

_THOUGHT = re.compile(r"<(?P<ends>/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_CONTROL = re.compile(r"<\|\w{1,40}\|>|</?s>")

_POINTS = r"(?:\s*points?)?"
_NUMBER = r"(?P<value>\d+(?:\.\d+)?)"
_TEN = r"(?:10(?:\.0+)?|ten)"
_RANGE = rf"(?:from\s+|of\s+)?(?:0|1|one)\s*(?:-|to)\s*{_TEN}"
_SCALE = (
    rf"(?:/\s*{_TEN}|\(?\s*(?:out\s+)?of\s+(?:a\s+(?:possible|total\s+of|maximum\s+of)\s+)?{_TEN}\s*\)?"
    rf"|\(?\s*(?:on\s+)?(?:a\s+|the\s+)?scale:?\s+{_RANGE}\s*\)?|\(\s*{_RANGE}\s*\))"
)
_VALUE = rf"(?<![\w.,/-]){_NUMBER}{_POINTS}(?:\s*{_SCALE})?{_POINTS}"
_OF_TEN = rf"{_NUMBER}{_POINTS}\s*{_SCALE}{_POINTS}"
_PLAIN_END = r"\s*[.!]*\s*"
_END = (
    rf"(?P<end>{_PLAIN_END}|\s*\([^()\d]*\)[.!]*\s*|(?:\s*[,;:.-]|\s+(?:because|since|as|overall|in\s+total)\b)[^\d]*)"
)
_LABEL = (
    r"(?:rating|score|grade|mark|评分|得分|分数|評価|点数|スコア|평점|점수|оценка"
    r"|bewertung|punktzahl|puntuación|calificación|valutazione|avaliação)"
    rf"(?:\s*[(\[]\s*(?:(?:on\s+)?(?:a\s+|the\s+)?scale:?\s+)?(?:{_RANGE}|(?:out\s+)?of\s+{_TEN})\s*[)\]])?"
)
_OWN = r"(?:(?:my|the|this|its|final|overall|total)\s+)*"
_JUST = r"(?:(?:so|thus|therefore|hence|overall|finally|in\s+conclusion|in\s+summary)\s*,?\s+)?"
_WHAT = r"(?:it|this|that|(?:the|this)\s+(?:reply|response|answer))"

RATINGS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"{_VALUE}{_PLAIN_END}",
        rf"(?:.*[.,;:!?)-]\s*)?{_JUST}{_OWN}{_LABEL}\s*[:=]\s*{_VALUE}{_END}",
        rf"(?:overall|final|total|verdict)\s*[:=]\s*{_OF_TEN}{_END}",
        rf"{_JUST}{_OWN}{_LABEL}(?:\s+(?:is|of|would\s+be|as)|\s*->|\s+-)?\s+"
        rf"{_VALUE}{_END}",
        rf"{_JUST}i(?:\s+would|'d|\s+will|'ll)?\s+(?:rate|give|score|grade|assign)\s+{_WHAT}\s+"
        rf"(?:(?:as|at|with)\s+)?(?:an?\s+)?(?:(?:rating|score|grade)\s+of\s+)?"
        rf"{_VALUE}{_END}",
    )
)
"""Forms of a whole line: the number alone, after a label, in a sentence about the rating or about who rates."""

_RATING_KEY = re.compile(r"(?:overall|final|total)?[ _]?(?:rating|score|grade)", re.IGNORECASE)
_SPELLED = re.compile(r"\b(?:two|three|four|five|six|seven|eight|nine|ten)\b", re.IGNORECASE)

_LEAD = r"(?:(?:my |the )?(?:final )?(?:verdict|winner|answer|choice|better reply)(?: is)?\W*)?"
VERDICT = re.compile(
    rf"\W*{_LEAD}(?:(?:reply |response |answer )?\W*(?P<one>a|b|1|2|first|second)"
    r"|(?P<tie>tie|draw|equal|neither|c))\W*",
    re.IGNORECASE,
)
LONGEST = 300
"""Characters: a longer line is an explanation."""
LONGEST_VERDICT = 80
LONGEST_JSON = 20_000
MOST_STARTS = 50
"""Braces that may begin the object."""


def rating(answer: str) -> float | None:
    """The rating from 1 to 10 that an answer's last line says, or its first one where no other has a number.

    A line says one where it is a number alone, or one after a label or in a plain sentence, with the scale of ten or
    none: ``8``, ``8/10``, ``Rating: **8** (good)``, ``I'd give it 9 out of 10``, ``{"rating": 8}``. Anything else is
    None: another scale (``4/5``, ``80 %``), two numbers (``7-8``), a comma (``8,5``), a number of something else.
    """
    text = answer_after_thought(answer)
    found = from_json(text)
    if found is not None:
        return in_range(found)
    lines = [line for line in map(without_markup, text.splitlines()) if line]
    if not lines:
        return None
    last = rating_of(lines[-1])
    others = " ".join(lines[1:])
    if last is not None or _SPELLED.search(others) or re.search(r"\d", others):
        return last
    return rating_of(lines[0])


def rating_of(line: str) -> float | None:
    if len(line) > LONGEST:
        return None
    found = next(filter(None, (form.fullmatch(line) for form in RATINGS)), None)
    if found is None or _SPELLED.search(found.groupdict().get("end") or ""):
        return None
    return in_range(float(found["value"]))


def verdict(answer: str) -> float | None:
    """The verdict that stands alone in an answer's last line: 1 for the first reply, 0 for the second, ½ for a tie."""
    lines = answer_after_thought(answer).splitlines()
    found = VERDICT.fullmatch(lines[-1]) if lines and len(lines[-1]) <= LONGEST_VERDICT else None
    if found is None:
        return None
    if found["tie"]:
        return 0.5
    return 1.0 if found["one"].lower() in ("a", "1", "first") else 0.0


def answer_after_thought(answer: str) -> str:
    """What follows the thought, without control tokens; nothing where the thought does not end."""
    answer = _CONTROL.sub("", answer)
    marks = list(_THOUGHT.finditer(answer))
    if not marks:
        return answer.strip()
    return answer[marks[-1].end() :].strip() if marks[-1]["ends"] else ""


def without_markup(line: str) -> str:
    """A line without emphasis, boxes, tags and brackets around a number; its dashes, colons and digits plain ones."""
    line = unicodedata.normalize("NFKC", line).replace("\ufe0f", "").replace("\u20e3", "")
    line = re.sub(r"[\u2010-\u2015\u2212]", "-", line).replace("\u2192", "->").replace("\u2019", "'")
    line = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", line)
    line = re.sub(r"<(rating|score|grade)>(.*?)</\1>", r"\1: \2", line, flags=re.IGNORECASE)
    line = re.sub(r"[*`#$\"]+|__", "", line)
    line = re.sub(r"[\[<]+\s*(\d+(?:\.\d+)?(?:\s*/\s*10)?)\s*[\]>]+", r"\1", line)
    line = re.sub(r"^\s*(?:[->•]\s+|\d+[.)]\s+(?=\D*\d))", "", line)
    return re.sub(r"\s+", " ", line).strip() if re.search(r"\w", line) else ""


def from_json(text: str) -> float | None:
    """The one rating in the JSON object that the text is or ends in; NaN where that holds none; None: it is no JSON."""
    text = text.removesuffix("```").rstrip()[-LONGEST_JSON:]
    if not text.endswith("}"):
        return None
    starts = (place for place, letter in enumerate(text) if letter == "{")
    for start in islice(starts, MOST_STARTS):
        try:
            value = json.loads(text[start:])
        except (ValueError, RecursionError):
            continue
        return number_in(value)
    return None


def number_in(value: dict[str, Any]) -> float:
    found = [item for key, item in value.items() if _RATING_KEY.fullmatch(key)]
    if len(found) != 1 or isinstance(found[0], bool):
        return float("nan")
    if isinstance(found[0], int | float):
        return float(found[0])
    read = rating_of(without_markup(found[0])) if isinstance(found[0], str) else None
    return float("nan") if read is None else read


def in_range(value: float) -> float | None:
    return value if 1 <= value <= 10 else None
