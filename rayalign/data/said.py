"""An answer as it is said: what follows the generation prompt, where it ends, and what is done where nothing follows.

``G`` is the rendering of the turns before an answer, with the generation prompt. ``S`` is that of the turns up to and
with the answer. Most templates make ``S`` begin with ``G``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rayalign.data.schema import Message, RowProblem, Turns, is_assistant
from rayalign.data.spelled import THOUGHT_TAGS, ControlTokens
from rayalign.data.template import THOUGHTS, Template, TemplateContext

_TAGS = (*THOUGHT_TAGS, *THOUGHT_TAGS.values())


class Said(NamedTuple):
    """One answer, within everything before it."""

    text: str
    """Up to and including its end token, where the template writes one."""
    start: int
    body: int
    """Where its end token stands."""
    rule: str = ""
    """A name in :data:`rayalign.data.render.RULES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endings:
    """What ends an answer."""

    run: str
    """What training appends, and rollouts stop at."""
    own: str
    """What the template writes to end an answer; empty: nothing."""
    after: str
    """What it writes after that."""
    controls: ControlTokens

    def split(self, answer: str) -> tuple[int, str]:
        """(length of the answer's body, what ends it), of an answer with everything that the template wrote of it.

        A special token at the end ends the answer, unless it closes what the answer opened: one that ends a tool call
        may be another than the one that ends a sentence.
        """
        tail = self.own + self.after
        if tail and answer.endswith(tail):
            return len(answer) - len(tail), self.own
        bare = answer.rstrip()
        last = self.controls.last(bare)
        if last and not self.controls.closes(last, bare):
            return len(bare) - len(last), last
        return len(answer), ""

    def once(self, text: str) -> tuple[str, str]:
        """(text, what ends it) of a text that is rendered already: of several end tokens at its end the first."""
        bare = text.rstrip()
        last = self.controls.last(bare)
        while last:
            before = bare.removesuffix(last).rstrip()
            earlier = self.controls.last(before)
            if not earlier or self.controls.closes(earlier, before):
                return bare, last
            bare, last = before, earlier
        return text, ""

    def final(self, closing: str) -> str:
        """What ends a conversation; empty: the run's end token is appended. A ``data.stop`` replaces the own end."""
        return "" if closing == self.own and not self._is_the_runs(closing) else closing

    def end(self, text: str, said: Said) -> int:
        """Where an answer ends within the ``text`` of a longer conversation; its end token counts if it is the same."""
        closing = said.text[said.body :]
        if closing and text.startswith(closing, said.body) and self.final(closing):
            return len(said.text)
        if not closing and text.startswith(self.run, said.body):  # a template that ends answers only between turns
            return said.body + len(self.run)
        return said.body

    def _is_the_runs(self, closing: str) -> bool:
        return self.run in closing


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """How answers are said in one template."""

    template: Template
    endings: Endings
    encode: Callable[[str], list[int]]
    asks: str
    """The generation prompt of a plain question."""

    def opening(self, turns: Turns, context: TemplateContext) -> str:
        """``G``: everything that inference shows before the answer to ``turns``."""
        return self.template.write(turns, context, generation_prompt=True)

    def said(self, turns: Turns, context: TemplateContext, *, opening: str | None = None) -> Said:
        """The last of ``turns`` as it is said; ``opening`` where it is known.

        Raises:
            RowProblem: the template refuses the turns, or writes the prompt otherwise once an answer follows.
        """
        before, answer = turns[:-1], turns[-1]
        opening = self.opening(before, context) if opening is None else opening
        whole = self._whole(turns, context)
        if whole.startswith(opening):
            return self._ended(whole, len(opening))
        thought = continued_thought(answer, opening)
        if thought is not None:
            closing = self.endings.split(whole)[1]
            return Said(opening + thought + closing, len(opening), len(opening) + len(thought), "thought")
        parted = shared_length(opening, whole)
        rest = opening[parted:]
        told_all = self.asks.endswith(rest) or parted >= shared_length(opening, self._whole(before, context))
        if told_all and self._may_go(rest, whole[parted:]):
            return self._ended(whole, self.boundary(opening, parted))._replace(rule="cut")
        for bare in _without_what_is_dropped(before):
            told = self.opening(bare, context)
            if whole.startswith(told) and whole == self._whole((*bare, answer), context):
                return self._ended(opening + whole[len(told) :], len(opening))._replace(rule="kept")
        raise RowProblem(
            "",
            "the chat template writes the prompt otherwise once an answer follows it, so that no answer follows what "
            "inference shows; name another in data.template",
        )

    def cut_off(self, turns: Turns, context: TemplateContext, *, opening: str | None = None) -> Said:
        """The last of ``turns`` as it was drawn before it was finished: no template writes such an answer."""
        if turns[-1].get("tool_calls") or any(name in turns[-1] for name in THOUGHTS):
            said = self.said(turns, context, opening=opening)
            return Said(said.text[: said.body], said.start, said.body, "unfinished")
        opening = self.opening(turns[:-1], context) if opening is None else opening
        text = opening + _after_tag(str(turns[-1]["content"]), opening)
        return Said(text, len(opening), len(text), "unfinished")

    def boundary(self, text: str, limit: int) -> int:
        """The last place at or before ``limit`` where a token of ``text`` ends.

        A control token stands for itself, so that only what follows the last one is looked at.
        """
        start = self.endings.controls.after_last(text, limit)
        segment = text[start:]
        whole = self.encode(segment) if start < limit else []
        for place in range(limit - start, 0, -1):
            ids = self.encode(segment[:place])
            if whole[: len(ids)] == ids:
                return start + place
        return start

    def _may_go(self, rest: str, answer: str) -> bool:
        """Whether the ``rest`` of a generation prompt, which ``answer`` does not continue, is no header of its turn.

        A header begins as those of other turns do, or comes later in the answer: then something was put before it.
        """
        if self.endings.controls.begins_turn(rest):
            return False
        for tag in _TAGS:  # an answer may spell a thought of its own
            rest = rest.replace(tag, "")
        return not rest.strip() or rest.strip() not in answer

    def _whole(self, turns: Turns, context: TemplateContext) -> str:
        return self.template.write(turns, context, generation_prompt=False)

    def _ended(self, whole: str, start: int) -> Said:
        length, closing = self.endings.split(whole[start:])
        body = start + length
        return Said(whole[:body] + closing, start, body)


def shared_length(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def continued_thought(answer: Message, opening: str) -> str | None:
    """What continues the thought that ``opening`` ends with, of an answer that spells one; None where it does not.

    The words are the row's: those of ``<think>…</think>…`` after the first tag, or of ``…</think>…`` as they are.
    """
    opened = _opened(opening)
    content = str(answer["content"])
    if opened is None or answer.get("tool_calls") or THOUGHT_TAGS[opened] not in content:
        return None
    if opened not in content.partition(THOUGHT_TAGS[opened])[0]:
        return content
    return None if content.partition(opened)[0].strip() else _after_tag(content, opening)


def _opened(opening: str) -> str | None:
    """The tag of a thought that a generation prompt ends with."""
    return next((tag for tag in THOUGHT_TAGS if opening.rstrip().endswith(tag)), None)


def _after_tag(content: str, opening: str) -> str:
    """The words without a tag that they repeat from the end of ``opening``, and without the white space after it."""
    opened = _opened(opening)
    if opened is None or not content.lstrip().startswith(opened):
        return content
    return content.lstrip().removeprefix(opened).removeprefix(opening[len(opening.rstrip()) :])


def _without_what_is_dropped(turns: Turns) -> Iterator[Turns]:
    """The turns without what some templates show before an answer and drop once it follows.

    That is thoughts and the words beside a tool call (gpt-oss), or the system's words (Mistral v0.3).
    """
    thoughtless = list(turns)
    for place, turn in enumerate(turns):
        if is_assistant(turn):
            thoughtless[place] = _without_thoughts(turn)
    yield tuple(thoughtless)
    if spoken := tuple(turn for turn in turns if turn["role"] != "system"):
        yield spoken


def _without_thoughts(turn: Message) -> Message:
    kept = {name: value for name, value in turn.items() if name not in THOUGHTS}
    return {**kept, "content": ""} if turn.get("tool_calls") else kept
