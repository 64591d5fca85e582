"""A chat template as a function from turns to text, and the forms in which it takes what rows say in several ways."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from rayalign.data.schema import PLAIN, WEIGHT, Fields, Message, RowProblem, Turns, assistant, user
from rayalign.data.shared_prompt import transcript
from rayalign.errors import UserError

TODAY = date(2024, 7, 26)
"""What templates write that ask for today's date, so that a row has the same tokens every day."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with an answer's thought."""
_REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What templates raise, on purpose and otherwise: they concatenate what may be no text."""
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now"})
PROBE = "rayalign"
_SILENCES: tuple[Literal[""] | None, ...] = ("", None)
_CALL = ("rayalignname", "rayalignkey", "rayalignvalue")


class TemplateContext(NamedTuple):
    """What a row gives its template beside turns."""

    tools: tuple[Fields, ...] | None = None
    variables: Fields = MappingProxyType({})
    """``chat_template_kwargs``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """How a template wants what can be said in several ways; found by trying them."""

    arguments: Literal["object", "text"] = "object"
    """The arguments of a tool call: a JSON object, or its text."""
    silence: Literal[""] | None = ""
    """The content of an answer that is a tool call alone."""
    thought: str | None = None
    """The name of :data:`THOUGHTS` that it reads; None: it reads none."""

    def adapt(self, turn: Message) -> dict[str, Any]:
        """The turn as the template takes it."""
        if isinstance(turn, dict) and turn.keys() <= PLAIN:
            return turn
        adapted = {key: value for key, value in turn.items() if key != WEIGHT}
        if calls := adapted.get("tool_calls"):
            adapted["tool_calls"] = [self._call(call) for call in calls]
            adapted["content"] = adapted["content"] or self.silence
        given = [name for name in THOUGHTS if name in adapted]
        if len(given) == 1 and self.thought is not None:
            adapted[self.thought] = adapted.pop(given[0])
        return adapted

    def _call(self, call: Fields) -> Fields:
        function = call["function"]
        arguments = function.get("arguments") or {}
        if self.arguments == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments) if arguments.strip() else {}
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How conversations are written: by a chat template, or as transcripts where there is none."""

    tokenizer: Any
    exists: bool
    """False: conversations are transcripts."""
    source: str | None = None
    """Jinja in place of the tokenizer's own."""
    variables: Fields = field(default_factory=dict)
    """For every row; a row's own ``chat_template_kwargs`` win."""
    date: date = TODAY
    """Stands for today's."""
    forms: Forms = Forms()

    def write(self, turns: Turns, context: TemplateContext, *, generation_prompt: bool) -> str:
        """The turns as text; raises :class:`RowProblem` where the template refuses them."""
        if not self.exists:
            return transcript(turns, generation_prompt=generation_prompt)
        try:
            return apply_template(
                self.tokenizer,
                self.source,
                [self.forms.adapt(turn) for turn in turns],
                generation_prompt=generation_prompt,
                tools=list(context.tools) if context.tools else None,
                strftime_now=self.date.strftime,
                **{**self.variables, **context.variables},
            )
        except _REFUSALS as error:
            raise RowProblem("", f"the chat template refuses these messages: {error}") from error

    def code(self, *, tools: bool = False) -> str:
        """The Jinja source; empty for transcripts. Some tokenizers have one of their own for tools.

        Raises:
            UserError: the tokenizer has several, and none of them is the usual one.
        """
        if not self.exists:
            return ""
        try:
            return str(self.tokenizer.get_chat_template(self.source, [{}] if tools else None))
        except ValueError as error:
            names = ", ".join(self.tokenizer.chat_template)
            raise UserError(
                f"the tokenizer has chat templates by name ({names}), and no default; name a file in data.template"
            ) from error

    def unread(self, names: Sequence[str], *, tools: bool = False) -> list[str]:
        """Those variables that the template does not read, and those that are not for rows to set."""
        code = self.code(tools=tools)
        return sorted(name for name in names if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", code))

    @property
    def tags(self) -> frozenset[str]:
        """What looks like a tag in the source, such as ``</think>``: templates may look for these in a content."""
        return frozenset(_TAG.findall(self.code()))


_TAG = re.compile(r"<[|/]?[A-Za-z][\w:.-]*[|]?>|\[/?[A-Z][A-Z_]*\]")


def find_forms(template: Template) -> Forms:
    """The first forms under which a tool call and a thought are written; the usual ones where none is."""
    if not template.exists:
        return Forms()
    name, key, value = _CALL
    given: tuple[tuple[Literal["object", "text"], Any], ...] = (
        ("object", {key: value}),
        ("text", json.dumps({key: value})),
    )
    thought = _thought_field(template)
    for silence, (kind, arguments) in product(_SILENCES, given):
        call = {"id": "rayaligns", "type": "function", "function": {"name": name, "arguments": arguments}}
        written = _tried(template, {"content": silence, "tool_calls": [call]})
        if all(part in written for part in _CALL) and "None" not in written:
            return Forms(arguments=kind, silence=silence, thought=thought)
    return Forms(thought=thought)


def _thought_field(template: Template) -> str | None:
    found = (name for name in THOUGHTS if _CALL[2] in _tried(template, {"content": PROBE, name: _CALL[2]}))
    return next(found, None)


def _tried(template: Template, answer: Message) -> str:
    """A question and ``answer`` as text; empty where the template refuses them."""
    turns = [*user(PROBE), {"role": "assistant", **answer}]
    try:
        return apply_template(
            template.tokenizer,
            template.source,
            turns,
            generation_prompt=False,
            strftime_now=template.date.strftime,
            **template.variables,
        )
    except _REFUSALS:
        return ""


def turn_tail(template: Template) -> str:
    """What the template writes after an answer.

    Raises:
        UserError: it refuses a plain conversation, or leaves out what is said in it.
    """
    if not template.exists:
        return ""
    probe = (*user(PROBE), *assistant(PROBE))
    try:
        whole = template.write(probe, TemplateContext(), generation_prompt=False)
    except RowProblem as problem:
        raise UserError(
            f"{problem.reason.replace('these messages', 'one user turn and one assistant turn')}; name another in "
            "data.template"
        ) from problem
    before, found, tail = whole.rpartition(PROBE)
    if not found or PROBE not in before:
        raise UserError("the chat template does not write what was said; name another in data.template")
    return tail


def apply_template(
    tokenizer: Any, source: str | None, turns: Sequence[Message], generation_prompt: bool, **variables: Any
) -> str:
    """The tokenizer's own rendering, whatever it raises."""
    return str(
        tokenizer.apply_chat_template(
            list(turns), chat_template=source, add_generation_prompt=generation_prompt, tokenize=False, **variables
        )
    )
