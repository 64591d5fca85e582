"""Whether a template writes all that is said: a mark in the place of every word must come out again.

What a template leaves out depends on the structure of a conversation (roles, fields, thoughts, tools), hardly on its
words. So every structure is tried once, with marks for words, and remembered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayalign.data.said import Speaker
from rayalign.data.schema import PLAIN, WEIGHT, Fields, Message, RowProblem, Turns, is_assistant
from rayalign.data.spelled import THOUGHT_TAGS
from rayalign.data.template import THOUGHTS, TemplateContext
from rayalign.data.tool_words import tool_words

LABELS = frozenset({"role", "id", "tool_call_id", "type", WEIGHT})
"""Fields of a turn that say who speaks of what to whom: they stand as they are, and a template may leave them out."""
SPEECH = frozenset({"function_call", "refusal", "images", "image", "audio", "video", "documents"})
"""Fields of a turn that are part of what is said, whether or not a template knows them."""
THOUGHT = "the thought of"
_REMEMBERED = 4096
_THOUGHT_WORDS = frozenset({*THOUGHT_TAGS, *THOUGHT_TAGS.values()})


class Mark(NamedTuple):
    """A made-up word that replaces words."""

    text: str
    turn: int
    """-1: none, it is in the tools."""
    what: str
    """For a person."""
    needed: bool = True
    """A template may leave out names, and fields that no template is known to read."""


class Verdict(NamedTuple):
    """What became of the marks of one structure."""

    lost: str
    """What the template leaves out and what to do, for a person; empty: nothing."""
    unnamed: bool
    """It leaves out a name or an unknown field."""


@dataclass(slots=True)
class _Marker:
    """Puts marks, numbered in the order of the structure, so that equal structures are marked alike."""

    marks: list[Mark] = field(default_factory=list)

    def put(self, turn: int, what: str, *, needed: bool = True) -> str:
        mark = Mark(f"Zq{len(self.marks):04d}qz", turn, what, needed)
        self.marks.append(mark)
        return mark.text

    def data(self, turn: int, what: str, value: Any, *, needed: bool = True) -> Any:
        """Any value, the keys of objects marked too; true, false, null and an empty text stand as they are."""
        if isinstance(value, dict):
            return {
                self.put(turn, what, needed=needed): self.data(turn, what, item, needed=needed)
                for item in value.values()
            }
        if isinstance(value, list | tuple):
            return [self.data(turn, what, item, needed=needed) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(turn, what, value, needed=needed)
        return self.put(turn, what, needed=needed) if isinstance(value, str) and value.strip() else value

    def _number(self, turn: int, what: str, value: float, *, needed: bool) -> float:
        number = 7_310_000 + len(self.marks)
        self.marks.append(Mark(str(number), turn, what, needed))
        return number if isinstance(value, int) else number + 0.5


class Marks:
    """The verdicts of one speaker."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        tags = sorted({*speaker.template.tags, *THOUGHT_TAGS, *THOUGHT_TAGS.values()}, key=len, reverse=True)
        self.tags = re.compile(f"({'|'.join(map(re.escape, tags))})")
        self.verdicts: dict[str, Verdict] = {}

    def check(self, turns: Turns, context: TemplateContext, text: str, *, answered: bool) -> frozenset[str]:
        """Which of :data:`rayalign.data.render.RULES` a row breaks: ``names``, or none.

        ``text`` is what is written of the turns; ``answered``: the last of them is an answer that is trained on.

        Raises:
            RowProblem: the template leaves out something that is said.
        """
        key = self._outline(turns, context, answered)
        if key not in self.verdicts:
            marker = _Marker()
            marked = tuple(self._turn(turn, place, marker) for place, turn in enumerate(turns))
            tools = tuple(_tool(tool, marker) for tool in context.tools) if context.tools else None
            given = TemplateContext(tools, context.variables)
            if len(self.verdicts) == _REMEMBERED:
                self.verdicts.clear()
            self.verdicts[key] = self._verdict(marked, given, marker.marks, answered)
        verdict = self.verdicts[key]
        if verdict.lost:
            raise RowProblem("", verdict.lost)
        refuse_other_words(turns, text, self.tags)
        absent = [word for word in tool_words(context.tools or ()) if not _is_written(word.text, text)]
        if lost := next((word.text for word in absent if word.needed), None):
            raise RowProblem(
                "",
                f"the chat template leaves out {lost!r} of the tools: name a template that writes it in data.template",
            )
        return frozenset({"names"} if verdict.unnamed or absent else ())

    def _outline(self, turns: Turns, context: TemplateContext, answered: bool) -> str:
        """What two conversations have in common that a template writes alike, whatever their words."""
        parts = [_plain_outline(turn) or repr(self._turn(turn, 0, _Marker())) for turn in turns]
        tools = [_tool(tool, _Marker()) for tool in context.tools or ()]
        return repr([answered, parts, tools, sorted(context.variables.items())])

    def _verdict(self, turns: Turns, context: TemplateContext, marks: Sequence[Mark], answered: bool) -> Verdict:
        whole = self.speaker.said(turns, context).text if answered else self.speaker.opening(turns, context)
        absent = [mark for mark in marks if mark.text not in whole]
        lost = next((mark for mark in absent if mark.needed and not self._is_said(mark, turns, context)), None)
        return Verdict(_told(lost, turns) if lost else "", any(not mark.needed for mark in absent))

    def _is_said(self, mark: Mark, turns: Turns, context: TemplateContext) -> bool:
        """Whether an answer that a history writes otherwise has the mark when it is said."""
        if mark.turn < 0 or not is_assistant(turns[mark.turn]):
            return False
        upto = turns[: mark.turn + 1]
        try:
            said = self.speaker.said(upto, context)
        except RowProblem:  # nothing follows what inference shows, yet its words may be written
            return mark.text in self.speaker.template.write(upto, context, generation_prompt=False)
        return mark.text in said.text[said.start :]

    def _turn(self, turn: Message, place: int, marker: _Marker) -> Message:
        marked: dict[str, Any] = {}
        for name, value in sorted(turn.items()):
            if name == "content":
                marked[name] = self._content(turn, place, marker)
            elif name == "tool_calls":
                marked[name] = [_call(call, place, marker) for call in value]
            elif name in LABELS or (name == "name" and turn["role"] == "tool"):
                marked[name] = value
            elif value not in ("", [], {}):
                needed = name in THOUGHTS or name in SPEECH
                marked[name] = marker.data(place, _field(name), value, needed=needed)
        return marked

    def _content(self, turn: Message, place: int, marker: _Marker) -> str:
        """The content with a mark for every stretch between tags that the template, or a thought, may know."""
        parts = _stretches(turn["content"], self.tags)
        beside = "the words beside the tool call of" if turn.get("tool_calls") else ""
        marked = ""
        for index, part in enumerate(parts):
            is_tag = index % 2 == 1
            marked += part if is_tag or not part.strip() else marker.put(place, beside or _kind(parts, index))
        return marked.strip()


def _plain_outline(turn: Message) -> str:
    """The outline of a turn of words alone, in which nothing can be a tag; empty for others."""
    content = turn["content"]
    is_plain = turn.keys() <= PLAIN and not _may_hold_tags(content)
    return f"{turn['role']} {bool(content.strip())}" if is_plain else ""


def _may_hold_tags(content: str) -> bool:
    """Whether a content has a character that every tag begins with."""
    return "<" in content or "[" in content


def _stretches(content: str, tags: re.Pattern[str]) -> list[str]:
    """Words and tags of a content in turn, words first."""
    return tags.split(content) if _may_hold_tags(content) else [content]


def _kind(parts: Sequence[str], index: int) -> str:
    """Whether a stretch of a content is a thought: what ends one comes after it, before what begins one."""
    following = next((tag for tag in parts[index + 1 :: 2] if tag in _THOUGHT_WORDS), "")
    return THOUGHT if following in THOUGHT_TAGS.values() else ""


def _field(name: str) -> str:
    return THOUGHT if name in THOUGHTS else f"{name} of"


def _call(call: Fields, place: int, marker: _Marker) -> Fields:
    function = call["function"]
    arguments = function.get("arguments")
    given = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    named = marker.put(place, "the tool call of")
    marked = marker.data(place, "an argument of the tool call of", given)
    kept = {name: value for name, value in call.items() if name in LABELS}
    return {**kept, "function": {"name": named, "arguments": marked}}


def _tool(tool: Fields, marker: _Marker) -> Fields:
    """A tool of the same outline: templates write whole schemas, or the parts that are marked here."""
    function = tool.get("function", tool)
    marked: dict[str, Any] = {"name": marker.put(-1, "the tools")}
    if function.get("description"):
        marked["description"] = marker.put(-1, "the tools")
    if function.get("parameters"):
        properties = {marker.put(-1, "the tools"): {"type": "string", "description": marker.put(-1, "the tools")}}
        marked["parameters"] = {"type": "object", "properties": properties, "required": []}
    return {**tool, "function": marked} if "function" in tool else marked


def _told(mark: Mark, turns: Turns) -> str:
    """What is left out, and what to do."""
    whose = f"turn {mark.turn + 1} ({turns[mark.turn]['role']})" if mark.turn >= 0 else ""
    left_out = " ".join(part for part in (mark.what, whose) if part)
    remedy = "write it into the content as <think>…</think>, or " if mark.what == THOUGHT else ""
    return f"the chat template leaves out {left_out}: {remedy}name a template that writes it in data.template"


def refuse_other_words(turns: Turns, text: str, tags: re.Pattern[str]) -> None:
    """Raise :class:`RowProblem` unless ``text`` contains every text that is said, as it is or as JSON.

    Marks have told that this structure is written; a template may still do something to certain words. What a history
    drops of earlier answers is left aside.
    """
    for place, turn in enumerate(turns):
        words = _words(turn, tags, is_earlier=place < len(turns) - 1 and is_assistant(turn))
        absent = [word for word in words if word not in text and _as_json(word) not in text]
        absent += [word for word in _arguments(turn) if not _is_written(word, text)]
        if absent:
            reason = (
                f"the chat template writes turn {place + 1} ({turn['role']}) otherwise: {absent[0][:60]!r} is not in it"
            )
            raise RowProblem("", reason)


def _as_json(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)[1:-1]


def _is_written(argument: str, text: str) -> bool:
    """Whether a text contains the argument of a call: as JSON, or word by word, since notations of calls differ."""
    return _as_json(argument) in text or all(run in text for run in re.findall(r"[A-Za-z0-9]+", argument))


def _words(turn: Message, tags: re.Pattern[str], *, is_earlier: bool) -> Iterator[str]:
    """The words and thoughts of a turn, without white space around them; of an earlier answer what a history keeps."""
    if not (is_earlier and turn.get("tool_calls")):
        parts = _stretches(turn["content"], tags)
        kept = (index for index in range(0, len(parts), 2) if not (is_earlier and _kind(parts, index)))
        yield from (parts[index].strip() for index in kept)
    if not is_earlier:
        yield from (turn[name].strip() for name in THOUGHTS if isinstance(turn.get(name), str))


def _arguments(turn: Message) -> Iterator[str]:
    """The texts in the arguments of a turn's calls."""
    for call in turn.get("tool_calls", ()):
        arguments = call["function"].get("arguments") or {}
        yield from _texts(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, without white space around it."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
