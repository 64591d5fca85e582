"""A whole conversation as one text, and which of it is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rayalign.data.said import Said, Speaker, shared_length
from rayalign.data.schema import RowProblem, Turns, is_assistant, is_learned
from rayalign.data.template import TemplateContext


class TextPiece(NamedTuple):
    """A stretch of a candidate's text."""

    text: str
    predicted: bool
    ended: bool = False
    """Its last token ends an answer."""


class Span(NamedTuple):
    """An answer that is predicted, as a place in a text."""

    turn: int
    start: int
    end: int
    ended: bool
    """It ends in an end token."""


class Spoken(NamedTuple):
    """A whole conversation as text that is trained on."""

    text: str
    spans: tuple[Span, ...]
    rules: frozenset[str]


def speak(
    turns: Turns,
    first: int,
    context: TemplateContext,
    speaker: Speaker,
    *,
    opening: str | None = None,
    finished: bool = True,
) -> Spoken:
    """A prompt of ``first`` turns, which ``opening`` writes, and the answers after it as one text."""
    *earlier, last = [place for place in range(first, len(turns)) if is_assistant(turns[place])]
    final = (speaker.said if finished else speaker.cut_off)(turns, context, opening=opening if last == first else None)
    closing = speaker.endings.final(final.text[final.body :])
    text = final.text[: final.body] + closing
    rules = {final.rule}
    spans = []
    for place in earlier:
        if not is_learned(turns[place]):
            rules.add("untrained")
            continue
        said = _earlier(turns[: place + 1], context, speaker, opening=opening if place == first else None)
        if said is None or not text.startswith(said.text[: said.body]):
            rules.add("history")
            continue
        end = speaker.endings.end(text, said)
        spans.append(Span(place, said.start, end, ended=end > said.body))
        rules.add(said.rule)
    spans.append(Span(last, final.start, len(text), ended=bool(closing)))
    return Spoken(text, tuple(spans), frozenset(rules - {""}))


def _earlier(turns: Turns, context: TemplateContext, speaker: Speaker, *, opening: str | None) -> Said | None:
    """An answer that others follow, as it is said; None where the template cannot say it alone."""
    try:
        return speaker.said(turns, context, opening=opening)
    except RowProblem:
        return None


def shared_prompt_and_spans(
    spoken: Sequence[Spoken], first: int, speaker: Speaker
) -> tuple[str, list[tuple[Span, ...]]]:
    """(the prompt that all candidates share, what is predicted of each).

    Where one answer parts from the generation prompt, the prompt ends there for all, and the others' answers begin
    there too.
    """
    leads = [own.text[: own.spans[0].start] for own in spoken]
    prompt = min(leads, key=len)
    if any(not lead.startswith(prompt) for lead in leads):
        length = min(shared_length(prompt, lead) for lead in leads)
        prompt = prompt[: speaker.boundary(max(leads, key=len), length)]
    starts = [own.spans[0].start for own in spoken if own.spans[0].turn == first]
    if not starts or len(prompt) != min(starts):
        return prompt, [own.spans for own in spoken]
    begun: list[tuple[Span, ...]] = []
    for own in spoken:
        head, *rest = own.spans
        head = head._replace(start=len(prompt)) if head.turn == first else head
        begun.append((head, *rest))
    return prompt, begun


def pieces_of(text: str, spans: Sequence[Span], start: int) -> tuple[TextPiece, ...]:
    """The text from ``start`` on: answers, and what stands between them."""
    pieces: list[TextPiece] = []
    for span in spans:
        if span.start > start:
            pieces.append(TextPiece(text[start : span.start], False))
        pieces.append(TextPiece(text[span.start : span.end], True, span.ended))
        start = span.end
    return tuple(pieces)


def to_last_trained(turns: Turns, first: int) -> Turns:
    """The turns up to the last answer that is to be trained."""
    trained = [at for at in range(first, len(turns)) if is_assistant(turns[at]) and is_learned(turns[at])]
    if not trained:
        raise RowProblem("", "every answer is marked not to be trained, so there is nothing to learn")
    return turns[: trained[-1] + 1]
