"""Answers with numbers: rewards, attributes, ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rayalign.data.formats.base import FINISHED, Body, Format, Texts, aligned
from rayalign.data.formats.turns import text_or_turns_said
from rayalign.data.schema import Fields, RowProblem, optional_number, optional_numbers, required, required_text

_SPEAKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _ranked(row: Fields) -> Body:
    completions = required(row, "completions")
    if not isinstance(completions, list | tuple) or not completions:
        raise RowProblem("completions", "completions must be a list of at least one answer")
    named = {f"completions[{index}]": value for index, value in enumerate(completions)}
    try:
        answers = {name: text_or_turns_said(named, name, may_be_empty=True) for name in named}
        prompt, candidates = aligned(text_or_turns_said(row, "prompt"), answers, may_be_empty=True)
    except RowProblem as problem:
        raise RowProblem(problem.field.partition("[")[0], problem.reason) from problem
    found = {
        "reward": optional_numbers(row, "rewards", len(candidates)),
        "behavior_logp": optional_numbers(row, "behavior_logps", len(candidates)),
    }
    columns = {name: values for name, values in found.items() if values is not None}
    if "reward" in columns:
        return Body(prompt, candidates, columns, preference="rewards")
    return Body(prompt, candidates, columns, preference="unstated" if len(candidates) > 1 else "stored")


def _helpsteer(row: Fields) -> Body:
    """One answer with attributes; ``helpfulness`` is its reward, unless ``columns`` names another as ``reward``."""
    prompt, answers = aligned(helpsteer_prompt(row, "prompt"), {"response": text_or_turns_said(row, "response")})
    score = "reward" if "reward" in row else "helpfulness"
    required(row, score)
    return Body(prompt, answers, {"reward": (optional_number(row, score),)}, preference="rewards")


def helpsteer_prompt(row: Fields, name: str) -> Texts:
    """A prompt as HelpSteer2 writes it: from the second turn on, ``<extra_id_1>`` and the speaker stand before each."""
    prompt = text_or_turns_said(row, name)
    if not isinstance(prompt, str) or not (pieces := _SPEAKER.split(prompt))[1:]:
        return prompt
    speakers = ["User", *pieces[1::2]]
    return tuple(
        {"role": speaker.lower(), "content": words.strip()}
        for speaker, words in zip(speakers, pieces[::2], strict=True)
    )


def _nectar(row: Fields) -> Body:
    """Answers by their ``rank``, 1 is the best."""
    answers = sorted(_objects(row, "answers", "answer"), key=_rank)
    named: dict[str, Texts] = {f"answers[{place}].answer": own["answer"] for place, own in enumerate(answers)}
    prompt, candidates = aligned(text_or_turns_said(row, "prompt"), named)
    return Body(prompt, candidates, {"rank": tuple(_rank(own) - 1 for own in answers)}, preference="ranks")


def _rank(answer: Mapping[str, Any]) -> float:
    return optional_number(answer, "rank")


def _ultrafeedback_raw(row: Fields) -> Body:
    """Every completion with its ``overall_score``."""
    completions = _objects(row, "completions", "response")
    named: dict[str, Texts] = {
        f"completions[{place}].response": own["response"] for place, own in enumerate(completions)
    }
    prompt, candidates = aligned(required_text(row, "instruction"), named)
    scores = [_score(own, place) for place, own in enumerate(completions)]
    return Body(prompt, candidates, {"reward": tuple(scores)}, preference="rewards")


def _score(completion: Mapping[str, Any], place: int) -> float:
    if completion.get("overall_score") is None:
        raise RowProblem("completions", f"completions[{place}] has no overall_score")
    return optional_number(completion, "overall_score")


def _objects(row: Fields, name: str, key: str) -> list[Mapping[str, Any]]:
    """A list of objects with a text at ``key``."""
    value = required(row, name)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, dict) for item in value):
        raise RowProblem(name, f"{name} must be a list of objects with {key}")
    for place, item in enumerate(value):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise RowProblem(name, f"{name}[{place}].{key} must be a text that is not empty")
    return list(value)


def _holds(value: Any, *keys: str) -> bool:
    """Whether this is a list of objects with such keys."""
    return isinstance(value, list | tuple) and all(isinstance(item, dict) and {*keys} <= item.keys() for item in value)


SCORED: Mapping[str, Format] = MappingProxyType(
    {
        "helpsteer": Format(
            says="One answer with attributes; ``helpfulness`` is its reward, or what ``columns`` names as ``reward``.",
            read=_helpsteer,
            needs=("prompt", "response", "helpfulness"),
            may=("reward",),
            leaves=("correctness", "coherence", "complexity", "verbosity"),
        ),
        "nectar": Format(
            says="Answers with ranks, 1 is the best; the prompt may be a transcript.",
            read=_nectar,
            needs=("prompt", "answers"),
            leaves=("num_responses",),
            is_found=lambda row: _holds(row["answers"], "answer", "rank"),
        ),
        "ultrafeedback_raw": Format(
            says="Completions, each with its ``overall_score``, which becomes its reward.",
            read=_ultrafeedback_raw,
            needs=("instruction", "completions"),
            leaves=("correct_answers", "incorrect_answers"),
            is_found=lambda row: _holds(row["completions"], "response", "overall_score"),
        ),
        "ranked": Format(
            says="K answers with rewards.",
            read=_ranked,
            needs=("prompt", "completions"),
            may=("rewards", "behavior_logps", FINISHED),
            leaves=("sampling",),
        ),
    }
)
