"""The chat template of a saved reward model: it writes a conversation as it was trained on, to its last token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rayalign.data.chat import Chat
from rayalign.data.schema import user
from rayalign.data.spelled import THOUGHT_TAGS
from rayalign.data.template import PROBE, Context, Template

_CONVERSATION = "rayalign_conversation"


def closing_template(chat: Chat) -> str | None:
    """The chat template, but a conversation ends with the end token of its last answer; None for raw text.

    Many templates write a line end after it, and one that writes no end token gets it. A thought that the template
    leaves out of answers is written, as in training, after the generation prompt that opened it. Variables and the
    date are those of training.
    """
    if not chat.has_template:
        return None
    template, endings = chat.speaker.template, chat.speaker.endings
    source = template.code()
    tail, closing = endings.own + endings.after, endings.final(endings.own) or endings.run
    thought = _opened_thought(template)
    fixed = "".join(_fixed(template, source))
    if _CONVERSATION in source or (tail == closing and not thought and not fixed):
        return source
    last = f"{_CONVERSATION}(messages, false)"
    return (
        f"{fixed}{{% macro {_CONVERSATION}(messages, add_generation_prompt) %}}{source.removesuffix(chr(10))}"
        "{% endmacro %}"
        "{% if add_generation_prompt or messages[-1].role != 'assistant' %}"
        f"{{{{ {_CONVERSATION}(messages, add_generation_prompt) }}}}"
        "{% else %}"
        f"{{% set written = {last} %}}"
        f"{{% set closed = written[:(written | length) - {len(tail)}] + {closing!r} if written.endswith({tail!r}) "
        "else written %}"
        f"{{% set ending = {closing!r} %}}{thought}{{{{ closed }}}}"
        "{% endif %}"
    )


def _opened_thought(template: Template) -> str:
    """Jinja that continues a thought as training does; empty where the generation prompt opens none."""
    opening = template.write(user(PROBE), Context(), generation_prompt=True)
    opened = next((tag for tag in THOUGHT_TAGS if opening.rstrip().endswith(tag)), None)
    if opened is None:
        return ""
    closes, space = THOUGHT_TAGS[opened], opening[len(opening.rstrip()) :]
    return (
        f"{{% set opening = {_CONVERSATION}(messages[:-1], true) if messages | length > 1 else '' %}}"
        "{% set content = messages[-1].content %}"
        f"{{% if opening and content is string and {closes!r} in content and not messages[-1].tool_calls "
        "and not written.startswith(opening) %}"
        f"{{% set spoken = {opened!r} in content.partition({closes!r})[0] %}}"
        f"{{% set words = content.partition({opened!r})[2].removeprefix({space!r}) if spoken else content %}}"
        f"{{% if not spoken or not content.partition({opened!r})[0].strip() %}}"
        "{% set closed = opening + words + ending %}"
        "{% endif %}{% endif %}"
    )


def _fixed(template: Template, source: str) -> Iterator[str]:
    """Jinja that sets what training set: the variables of every row, and the date."""
    for name, value in template.variables.items():
        yield f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
    formats = sorted({match[2] for match in re.finditer(r"strftime_now\(\s*(['\"])(.+?)\1", source)})
    if formats:
        dates = {format: template.date.strftime(format) for format in formats}
        yield f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(dates)}[format] }}}}{{% endmacro %}}"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return {"null": "none"}.get(json.dumps(value), json.dumps(value))
