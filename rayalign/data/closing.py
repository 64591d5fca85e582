"""The chat template of a saved model: it writes a conversation as it was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rayalign.data.chat import Chat
from rayalign.data.said import Speaker
from rayalign.data.schema import RowProblem, Turns, assistant, user
from rayalign.data.spelled import THOUGHT_TAGS
from rayalign.data.template import PROBE, Template, TemplateContext

_MACRO = "rayalign_conversation"
_CLOSED = """\
{% macro rayalign_conversation(messages, add_generation_prompt) %}@SOURCE{% endmacro %}
{%- if add_generation_prompt or messages[-1].role != 'assistant' %}
{{- rayalign_conversation(messages, add_generation_prompt) }}
{%- else %}
{%- set before, answer = messages[:-1], messages[-1] %}
{%- set said = namespace(text=rayalign_conversation(messages, false)) %}
@SAID
{%- if said.text.endswith(@TAIL) %}
{%- set said.text = said.text[:(said.text | length) - @LENGTH] + @CLOSING %}
{%- endif %}
{{- said.text }}
{%- endif %}"""
"""The conversation ends where training ends it: with ``@CLOSING`` in place of ``@TAIL``, which the template writes."""
_THOUGHT = """\
{%- set opening = rayalign_conversation(before, true) if before else '' %}
{%- if before and not said.text.startswith(opening) and not answer.tool_calls and @CLOSES in answer.content %}
{%- set spelled = @OPENS in answer.content.partition(@CLOSES)[0] %}
{%- set words = answer.content.partition(@OPENS)[2].removeprefix(@SPACE) if spelled else answer.content %}
{%- if not spelled or not answer.content.partition(@OPENS)[0].strip() %}
{%- set said.text = opening + words + @TAIL %}
{%- endif %}
{%- endif %}"""
"""A thought that the template leaves out of answers continues the generation prompt that opened it."""
_KEPT = """\
{%- set opening = rayalign_conversation(before, true) if before else '' %}
{%- if before and not said.text.startswith(opening) %}
{%- set bare = namespace(turns=[]) %}
{%- for turn in before if @SHOWN %}
{%- if turn.role == 'assistant' and turn.tool_calls %}
{%- set turn = dict(role=turn.role, content='', tool_calls=turn.tool_calls) %}
{%- elif turn.role == 'assistant' %}
{%- set turn = dict(role=turn.role, content=turn.content) %}
{%- endif %}
{%- set bare.turns = bare.turns + [turn] %}
{%- endfor %}
{%- set told = rayalign_conversation(bare.turns, true) if bare.turns else '' %}
{%- if bare.turns and said.text == rayalign_conversation(bare.turns + [answer], false) %}
{%- if said.text.startswith(told) %}
{%- set said.text = opening + said.text[told | length:] %}
{%- endif %}
{%- endif %}
{%- endif %}"""
"""The prompt keeps what inference shows and a whole conversation drops: thoughts, or the system's words."""


def policy_template(chat: Chat) -> str | None:
    """The chat template of a policy that was trained with ``chat``; None where it is the tokenizer's own.

    The variables of every row are its defaults, which a server may change.
    """
    template = chat.speaker.template
    if not chat.has_template or (template.source is None and not template.variables):
        return None
    return "".join(_defaults(template)) + template.code()


def closing_template(chat: Chat) -> str | None:
    """The chat template of a reward model that was trained with ``chat``; None for raw text.

    A conversation ends with the end token of its last answer, where its score is read. Variables and the date are
    those of training.
    """
    if not chat.has_template:
        return None
    template, endings = chat.speaker.template, chat.speaker.endings
    source = template.code()
    tail, closing = endings.own + endings.after, endings.final(endings.own) or endings.run
    rules = "\n".join(_rules(chat.speaker))
    fixed = "".join(_fixed(template, source))
    if _MACRO in source or (tail == closing and not rules and not fixed):
        return source
    filled = {"SAID": rules, "TAIL": repr(tail), "LENGTH": str(len(tail)), "CLOSING": repr(closing)}
    return fixed + _filled(_filled(_CLOSED, filled), {"TAIL": repr(tail), "SOURCE": source.removesuffix("\n")})


def _rules(speaker: Speaker) -> Iterator[str]:
    """Jinja of the rules by which this template's conversations are not trained on as it writes them whole."""
    opening = speaker.opening(user(PROBE), TemplateContext())
    opens = next((tag for tag in THOUGHT_TAGS if opening.rstrip().endswith(tag)), None)
    if opens is not None:
        space = opening[len(opening.rstrip()) :]
        yield _filled(_THOUGHT, {"OPENS": repr(opens), "CLOSES": repr(THOUGHT_TAGS[opens]), "SPACE": repr(space)})
    call = {"id": "rayaligns", "type": "function", "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}
    called = {"role": "assistant", "content": PROBE, "tool_calls": [call]}
    result = {"role": "tool", "content": PROBE, "name": PROBE, "tool_call_id": "rayaligns"}
    if _keeps(speaker, ({"role": "system", "content": PROBE}, *user(PROBE))):
        yield _filled(_KEPT, {"SHOWN": "turn.role != 'system'"})
    if _keeps(speaker, (*user(PROBE), called, result)):
        yield _filled(_KEPT, {"SHOWN": "true"})


def _keeps(speaker: Speaker, before: Turns) -> bool:
    try:
        return speaker.said((*before, *assistant(PROBE)), TemplateContext()).rule == "kept"
    except RowProblem:
        return False


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}", value)
    return text


def _fixed(template: Template, source: str) -> Iterator[str]:
    """Jinja that sets what training set: the variables of every row, and the date."""
    yield from _defaults(template)
    formats = sorted({match[2] for match in re.finditer(r"strftime_now\(\s*(['\"])(.+?)\1", source)})
    if formats:
        dates = {format: template.date.strftime(format) for format in formats}
        yield f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(dates)}[format] }}}}{{% endmacro %}}"


def _defaults(template: Template) -> Iterator[str]:
    for name, value in template.variables.items():
        yield f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return {"null": "none"}.get(json.dumps(value), json.dumps(value))
