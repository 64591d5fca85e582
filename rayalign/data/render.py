"""An example as text: what is the prompt, what is predicted, and by which rule where that is not plain.

An answer is predicted where the text that is trained on writes it as it is said (:mod:`rayalign.data.said`), after
what inference shows before it. What a history drops is not in the history, and nothing is trained in a context that
inference never shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from rayalign.data.given import as_asked, begun_once, refuse_rendered, restore_controls, shielded, text_as_turns
from rayalign.data.marks import Marks
from rayalign.data.said import Speaker
from rayalign.data.schema import Example, RowProblem
from rayalign.data.spoken import TextPiece, pieces_of, shared_prompt_and_spans, speak, to_last_trained
from rayalign.data.template import TemplateContext

RULES: Mapping[str, str] = MappingProxyType(
    {
        "history": "an earlier answer that the template writes otherwise in a history is seen, not predicted",
        "untrained": "an answer that is marked not to be trained is seen, not predicted",
        "cut": "the prompt ends before what the generation prompt opens and an answer does not continue",
        "thought": "a thought that the template leaves out of answers continues the generation prompt that opened it",
        "kept": "the prompt has what inference shows and a whole conversation drops, such as a thought",
        "unfinished": "an answer that was cut off stands as it was drawn, without an end token",
        "spelled": "control tokens that somebody spells are tokenized as text",
        "transcript": "a prompt `Human: … Assistant:` is read as turns",
        "names": "the template leaves out a `name`, or a field of a turn or a detail of a tool that it does not know",
    }
)
"""Where a row's text is not its conversation as the template writes it whole: told and counted."""


class WrittenCandidate(NamedTuple):
    """A candidate as text after the prompt."""

    pieces: tuple[TextPiece, ...]
    """The last one is predicted."""
    finished: bool = True
    """It ends in an end token: the run's, where its text holds none."""


class Rendered(NamedTuple):
    """One example as text."""

    example: Example
    """What is trained on: the prompt of a single conversation reaches to the first answer that is predicted."""
    prompt: str
    candidates: tuple[WrittenCandidate, ...]
    raw: bool
    """Text without a template: the tokenizer's own beginning-of-sequence token goes in front."""
    rules: frozenset[str] = frozenset()
    """Names in :data:`RULES`."""


def render_example(example: Example, speaker: Speaker, marks: Marks, *, rendered: bool, completed: bool) -> Rendered:
    """The texts of an example.

    ``rendered``: texts of rows are rendered already. ``completed``: fresh answers will follow the same prompt.

    Raises:
        RowProblem: the template refuses its turns or leaves something out, no answer is left to train on, or a text is
            rendered already and should not be.
    """
    controls = speaker.endings.controls
    asked = as_asked(example) if speaker.template.exists else example
    given = text_as_turns(asked) if speaker.template.exists else asked
    given = begun_once(given, controls.begin)
    rules = {"transcript"} if asked is not example else set()
    if not rendered:
        if not example.drawn:
            was_text = isinstance(asked.prompt, str) and not isinstance(given.prompt, str)
            refuse_rendered(given, controls, end=speaker.endings.run, was_text=was_text)
        words = shielded(given, controls)
        rules |= {"spelled"} if words is not given else set()
        given = words
    if isinstance(given.prompt, str):
        found = _render_texts(given, speaker)
    else:
        found = _render_turns(given, speaker, marks, completed=completed)
    trained_on = asked if found.example is given else restore_controls(found.example, controls)
    return found._replace(example=trained_on, rules=found.rules | rules)


def _render_texts(example: Example, speaker: Speaker) -> Rendered:
    """Texts as they are; one that ends in a control token is ended by it."""
    assert isinstance(example.prompt, str)
    written = []
    for answer, finished in zip(example.candidates, example.whether_finished, strict=True):
        assert isinstance(answer, str)
        text, last = speaker.endings.once(answer) if finished else (answer, "")
        inside = next((end for end in (last, speaker.endings.run) if end and end in text.removesuffix(last)), None)
        if inside:
            raise RowProblem("", f"an answer holds the end token {inside!r} in its text")
        written.append(WrittenCandidate((TextPiece(text, True, bool(last)),), finished))
    rules = frozenset[str]() if all(example.whether_finished) else frozenset({"unfinished"})
    return Rendered(example, example.prompt, tuple(written), True, rules)


def _render_turns(example: Example, speaker: Speaker, marks: Marks, *, completed: bool) -> Rendered:
    assert not isinstance(example.prompt, str)
    context = TemplateContext(example.tools, example.template_kwargs)
    _refuse_variables(context, speaker)
    opening = speaker.opening(example.prompt, context)
    raw = not speaker.template.exists
    if not example.candidates:
        return Rendered(example, opening, (), raw, marks.check(example.prompt, context, opening, answered=False))
    first = len(example.prompt)
    spoken = []
    for answer, finished in zip(example.candidates, example.whether_finished, strict=True):
        assert not isinstance(answer, str)
        turns = to_last_trained((*example.prompt, *answer), first)
        own = speak(turns, first, context, speaker, opening=opening, finished=finished)
        rules = marks.check(turns, context, own.text, answered=True)
        spoken.append(own._replace(rules=own.rules | rules | ({"untrained"} if turns[-1] is not answer[-1] else set())))
    prompt, spans = shared_prompt_and_spans(spoken, first, speaker)
    if completed and prompt != opening:
        raise RowProblem(
            "",
            "fresh answers will follow the generation prompt, and this answer does not continue it: spell the thought "
            "that it opens, or name a template without one in data.template",
        )
    written = tuple(
        WrittenCandidate(pieces_of(own.text, places, len(prompt)), finished)
        for own, places, finished in zip(spoken, spans, example.whether_finished, strict=True)
    )
    if len(spoken) == 1:
        example = _reaching(example, spans[0][0].turn)
    return Rendered(example, prompt, written, raw, frozenset().union(*(own.rules for own in spoken)))


def _refuse_variables(context: TemplateContext, speaker: Speaker) -> None:
    unread = speaker.template.unread(list(context.variables), tools=bool(context.tools))
    if unread and speaker.template.exists:
        raise RowProblem(
            "chat_template_kwargs",
            f"the chat template does not read {', '.join(unread)} of chat_template_kwargs; leave it out, or name "
            "another template in data.template",
        )


def _reaching(example: Example, turn: int) -> Example:
    """The example of one conversation whose prompt reaches to a turn of it."""
    (answer,) = example.candidates
    assert not isinstance(example.prompt, str) and not isinstance(answer, str)
    if turn == len(example.prompt):
        return example
    turns = (*example.prompt, *answer)
    return replace(example, prompt=turns[:turn], candidates=(turns[turn:],))
