"""The formats that rows come in, found by their fields and named: one function each from fields to a body.

| name | fields |
|---|---|
| ``preference`` | ``prompt, chosen, rejected``: texts or lists of turns |
| ``implicit_preference`` | ``chosen, rejected``: the prompt is what they share |
| ``ultrafeedback`` | ``prompt`` as text, ``chosen, rejected`` as whole conversations |
| ``hh`` | ``chosen, rejected``: transcripts ``\\n\\nHuman: … \\n\\nAssistant: …`` |
| ``ranked`` | ``prompt, completions, rewards``, optionally ``behavior_logps`` |
| ``unpaired_preference`` | ``prompt, completion, label`` |
| ``prompt_completion`` | ``prompt, completion`` |
| ``messages`` | ``messages`` |
| ``text`` | ``text`` |
| ``prompt_only`` | ``prompt`` |

Every pair may carry ``margin``, ``soft_label`` and the scores ``chosen_score, rejected_score``; every row ``tools`` and
``chat_template_kwargs``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from rayalign.data.records import BadRow, RawRow
from rayalign.data.schema import (
    MISSING,
    Example,
    Fields,
    RowProblem,
    Turns,
    assistant,
    bad_row,
    finished,
    is_assistant,
    number,
    numbers,
    required,
    template_kwargs,
    text,
    text_or_turns,
    tools,
    turns,
    user,
)
from rayalign.data.split import is_transcript, split_texts, split_turns, transcript_turns
from rayalign.errors import UserError

Texts = str | Turns


class Body(NamedTuple):
    """What one format says about one row."""

    prompt: Texts
    candidates: tuple[Texts, ...]
    columns: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    continues: bool = False


def parse_row(row: RawRow, *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Example | BadRow:
    """The row as an example, or the field and reason why not.

    Args:
        format: a name of :data:`FORMATS`, or ``auto`` to find it by the row's fields.
        columns: our field → the file's field, where the names differ.

    Raises:
        UserError: ``format`` is not a format.
    """
    if format != "auto" and format not in FORMATS:
        raise UserError(f"data.format: {format!r} is not a format; take auto or one of {', '.join(FORMATS)}")
    try:
        fields = _renamed(row.value, columns or {})
        name = detect_format(fields) if format == "auto" else format
        body = FORMATS[name](fields)
        return Example(
            format=name,
            prompt=body.prompt,
            candidates=body.candidates,
            columns=body.columns,
            continues=body.continues,
            finished=finished(fields, len(body.candidates)),
            tools=tools(fields),
            template_kwargs=template_kwargs(fields),
            source=row.source,
            line=row.line,
        )
    except RowProblem as problem:
        return bad_row(row, problem)


def detect_format(row: Fields) -> str:
    """The format that has these fields; raises :class:`RowProblem` when none has."""
    if "chosen" in row or "rejected" in row:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if "prompt" not in row:
            return "hh" if is_transcript(chosen) and is_transcript(rejected) else "implicit_preference"
        whole = isinstance(row["prompt"], str) and isinstance(chosen, list | tuple) and not _starts_with_answer(chosen)
        return "ultrafeedback" if whole else "preference"
    if "completions" in row:
        return "ranked"
    if "completion" in row:
        return "unpaired_preference" if "label" in row else "prompt_completion"
    for field, name in (("messages", "messages"), ("text", "text"), ("prompt", "prompt_only")):
        if field in row:
            return name
    listed = ", ".join(sorted(row)) or "none"
    raise RowProblem("", f"no format has these fields: {listed}; name them with `columns: {{prompt: …, chosen: …}}`")


def _preference(row: Fields) -> Body:
    prompt = text_or_turns(row, "prompt")
    pair = {name: text_or_turns(row, name, may_be_empty="finished" in row) for name in ("chosen", "rejected")}
    prompt, (chosen, rejected) = _aligned(prompt, pair, may_be_empty="finished" in row)
    if not isinstance(prompt, str):
        prompt, chosen, rejected = split_turns((*prompt, *chosen), (*prompt, *rejected))
    return Body(prompt, (chosen, rejected), _pair_columns(row))


def _implicit_preference(row: Fields) -> Body:
    chosen, rejected = text_or_turns(row, "chosen"), text_or_turns(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = split_texts(chosen, rejected)
        pair = {"chosen": chosen, "rejected": rejected}
        return Body(prompt, tuple(text(pair, name) for name in pair), _pair_columns(row), continues=True)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowProblem("rejected", "chosen and rejected must both be texts or both be lists of turns")
    return _conversations(row, chosen, rejected)


def _ultrafeedback(row: Fields) -> Body:
    prompt = text(row, "prompt")
    body = _conversations(row, turns(row, "chosen"), turns(row, "rejected"))
    if not any(turn["content"].strip() == prompt.strip() for turn in body.prompt if isinstance(turn, Mapping)):
        raise RowProblem("prompt", "prompt is none of the turns that chosen and rejected share")
    return body


def _hh(row: Fields) -> Body:
    """An empty last reply is a reply (annotators did prefer silence): its response is the end token alone."""
    chosen, rejected = (
        transcript_turns(text(row, "chosen"), "chosen"),
        transcript_turns(text(row, "rejected"), "rejected"),
    )
    prompt, chosen, rejected = split_turns(chosen, rejected)
    return Body(prompt, (chosen, rejected), _pair_columns(row))


def _ranked(row: Fields) -> Body:
    completions = required(row, "completions")
    if not isinstance(completions, list | tuple) or not completions:
        raise RowProblem("completions", "completions must be a list of at least one answer")
    named = {f"completions[{index}]": value for index, value in enumerate(completions)}
    try:
        values = {name: text_or_turns(named, name, may_be_empty=True) for name in named}
        prompt, candidates = _aligned(text_or_turns(row, "prompt"), values, may_be_empty=True)
    except RowProblem as problem:
        raise RowProblem(problem.field.partition("[")[0], problem.reason) from problem
    found = {
        "reward": numbers(row, "rewards", len(candidates)),
        "behavior_logp": numbers(row, "behavior_logps", len(candidates)),
    }
    return Body(prompt, candidates, {name: values for name, values in found.items() if values is not None})


def _unpaired_preference(row: Fields) -> Body:
    label = required(row, "label")
    if label not in (True, False):
        raise RowProblem("label", f"label must be true (desirable) or false, not {label!r}")
    return _prompt_completion(row)._replace(columns={"label": (float(label),)})


def _prompt_completion(row: Fields) -> Body:
    completion = {"completion": text_or_turns(row, "completion", may_be_empty="finished" in row)}
    return Body(*_aligned(text_or_turns(row, "prompt"), completion, may_be_empty="finished" in row))


def _messages(row: Fields) -> Body:
    """The prompt is everything before the first answer; later answers are predicted, turns between them only seen."""
    messages = turns(row, "messages")
    first = next((index for index, turn in enumerate(messages) if is_assistant(turn)), None)
    if first is None:
        raise RowProblem("messages", "messages has no turn of the assistant: there is nothing to learn")
    if first == 0:
        raise RowProblem("messages", "messages starts with the assistant: there is no prompt")
    return Body(messages[:first], (_answered(messages[first:], "messages"),))


def _text(row: Fields) -> Body:
    return Body("", (text(row, "text"),), continues=True)


def _prompt_only(row: Fields) -> Body:
    return Body(text_or_turns(row, "prompt"), ())


FORMATS: Mapping[str, Callable[[Fields], Body]] = MappingProxyType(
    {
        "preference": _preference,
        "implicit_preference": _implicit_preference,
        "ultrafeedback": _ultrafeedback,
        "hh": _hh,
        "ranked": _ranked,
        "unpaired_preference": _unpaired_preference,
        "prompt_completion": _prompt_completion,
        "messages": _messages,
        "text": _text,
        "prompt_only": _prompt_only,
    }
)


def _renamed(row: Fields, columns: Mapping[str, str]) -> dict[str, object]:
    """The row under our names and without nulls."""
    fields = {name: value for name, value in row.items() if value is not None}
    for ours, theirs in columns.items():
        if theirs not in fields:
            raise RowProblem(theirs, f"{theirs} is missing, which `columns` names as {ours}")
    moved = {ours: fields[theirs] for ours, theirs in columns.items()}
    kept = {name: value for name, value in fields.items() if name not in columns.values()}
    return {**kept, **moved}


def _aligned(
    prompt: Texts, candidates: Mapping[str, Texts], *, may_be_empty: bool = False
) -> tuple[Texts, tuple[Texts, ...]]:
    """Prompt and candidates as all texts, or else as all turns."""
    if isinstance(prompt, str):
        if all(isinstance(value, str) for value in candidates.values()):
            return prompt, tuple(candidates.values())
        prompt = user(prompt)
    return prompt, tuple(_after(prompt, value, name, may_be_empty=may_be_empty) for name, value in candidates.items())


def _after(prompt: Turns, value: Texts, name: str, *, may_be_empty: bool = False) -> Turns:
    """A candidate as the turns that follow the prompt; a whole conversation loses the prompt that it repeats."""
    answer = assistant(value) if isinstance(value, str) else value
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    if not answer or not is_assistant(answer[0]):
        raise RowProblem(name, f"{name} must start with a turn of the assistant, or repeat the prompt before it")
    return _answered(answer, name, may_be_empty=may_be_empty)


def _answered(answer: Turns, name: str, *, may_be_empty: bool = False) -> Turns:
    last = answer[-1]
    if not is_assistant(last):
        raise RowProblem(name, f"{name} ends in a turn of {last['role']}: the last turn must be the assistant's")
    if not may_be_empty and not last["content"].strip() and not last.get("tool_calls"):
        raise RowProblem(name, f"{name} is empty: its last turn says nothing")
    return answer


def _conversations(row: Fields, chosen: Turns, rejected: Turns) -> Body:
    prompt, chosen, rejected = split_turns(chosen, rejected)
    return Body(prompt, (_answered(chosen, "chosen"), _answered(rejected, "rejected")), _pair_columns(row))


def _pair_columns(row: Fields) -> dict[str, tuple[float, ...]]:
    columns: dict[str, tuple[float, ...]] = {}
    for chosen, rejected in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        if chosen in row or rejected in row:
            required(row, chosen), required(row, rejected)
            columns["reward"] = (number(row, chosen), number(row, rejected))
    if "margin" in row:
        columns["margin"] = (number(row, "margin"), MISSING)
    if "soft_label" in row:
        columns["soft_label"] = (number(row, "soft_label"), MISSING)
        if not 0 <= columns["soft_label"][0] <= 1:
            raise RowProblem("soft_label", f"soft_label is {row['soft_label']}: a probability lies in [0, 1]")
    return columns


def _starts_with_answer(value: object) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, dict) and first.get("role") == "assistant"
