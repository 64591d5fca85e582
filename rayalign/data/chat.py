"""Where a prompt ends: the only place that decides it, from the chat template or from raw text.

The text of a candidate is the rendered whole minus the rendered prompt where the template is prefix-stable, else the
answer alone; it is tokenized apart from the prompt, exactly as a rollout continues the prompt's token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from rayalign.data.lines import open_binary
from rayalign.data.schema import Example, RowProblem, Turns, assistant, is_assistant, user
from rayalign.data.split import transcript
from rayalign.errors import UserError

_PROBE = "rayalign"
_MARK = "\ue000rayalign\ue001"
"""Stands in nobody's text: the characters are of Unicode's private use."""
_REFUSALS = (TemplateError, TypeError, ValueError)
"""What templates raise, on purpose and otherwise: they concatenate what may be no text."""


class Piece(NamedTuple):
    """A stretch of a candidate's text: an answer, or what stands between two answers."""

    text: str
    predicted: bool


class Rendered(NamedTuple):
    """One example as text."""

    prompt: str
    candidates: tuple[tuple[Piece, ...], ...]
    """Answers and what stands between them, in turn; the first and the last piece are answers."""
    raw: bool
    """No template: the tokenizer's own beginning-of-sequence token goes in front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A tokenizer and how conversations are written in its tokens; made by :func:`make_chat`."""

    tokenizer: Any
    has_template: bool
    template: str | None
    """A Jinja template in place of the tokenizer's own."""
    end_id: int
    """The one token that ends a response: what training appends and rollouts stop at."""
    end_text: str
    after_end: str
    """What the template writes after an answer that is no part of it, such as a line end."""
    lead_ids: tuple[int, ...]
    """What the tokenizer puts in front of raw text: one beginning-of-sequence token, or nothing."""
    splits_cleanly: bool
    """True where a text has the same tokens alone as after a line end, so that nothing needs context."""

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids of every text, without special tokens of the tokenizer's own."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, _encode(self.tokenizer, unique), strict=True))

    def render(self, example: Example) -> Rendered:
        """The texts of one example; raises :class:`RowProblem` when the template refuses its messages."""
        prompt, candidates = example.prompt, example.candidates
        if isinstance(prompt, str):
            if not self.has_template or example.continues:
                answers = tuple((Piece(answer, True),) for answer in candidates if isinstance(answer, str))
                return Rendered(prompt, answers, raw=True)
            prompt = user(prompt)
        opening = self._write(prompt, example, generation_prompt=True)
        turns = (assistant(answer) if isinstance(answer, str) else answer for answer in candidates)
        pieces = tuple(tuple(self._pieces(prompt, opening, answer, example)) for answer in turns)
        return Rendered(opening, pieces, raw=not self.has_template)

    def _pieces(self, prompt: Turns, opening: str, answer: Turns, example: Example) -> Iterator[Piece]:
        """An answer's turns as text; ``opening`` is everything up to where the first of them starts."""
        places = [place for place, turn in enumerate(answer) if is_assistant(turn)]
        for place, following in zip(places, [*places[1:], None], strict=True):
            said = self._said((*prompt, *answer[: place + 1]), opening, example)
            yield Piece(said, True)
            if following is not None:
                whole = self._write((*prompt, *answer[:following]), example, generation_prompt=True)
                if whole.startswith(opening + said):
                    yield Piece(whole[len(opening) + len(said) :], False)
                else:
                    yield Piece(self._after(len(prompt) + place, (*prompt, *answer[:following]), whole, example), False)
                opening = whole

    def _said(self, turns: Turns, opening: str, example: Example) -> str:
        """The last turn's text, up to and including its end token where the template writes one."""
        whole = self._write(turns, example, generation_prompt=False)
        if whole.startswith(opening):
            return whole[len(opening) :].removesuffix(self.after_end)
        if turns[-1].get("tool_calls"):
            raise RowProblem("", "the chat template rewrites the prompt when a tool call follows it")
        return str(turns[-1]["content"])

    def _after(self, place: int, turns: Turns, whole: str, example: Example) -> str:
        """What stands after the answer ``turns[place]`` in ``whole``, where what stands before it is written anew.

        The place is found by writing a mark instead of the answer: the answer's own words may stand elsewhere too.
        """
        marked = self._write((*turns[:place], *assistant(_MARK), *turns[place + 1 :]), example, generation_prompt=True)
        head, _, rest = marked.partition(_MARK)
        answer = whole[len(head) : len(whole) - len(rest)]
        if head + answer + rest != whole or answer.strip() != turns[place]["content"].strip():
            raise RowProblem("", "the chat template rewrites an earlier answer, so the turns after it have no place")
        before, found, beyond = rest.partition(self.end_text)
        return beyond if found and not before.strip() else rest

    def _write(self, turns: Turns, example: Example, *, generation_prompt: bool) -> str:
        if not self.has_template:
            return transcript(turns, generation_prompt=generation_prompt)
        try:
            return _apply(
                self.tokenizer,
                self.template,
                turns,
                generation_prompt,
                tools=list(example.tools) if example.tools else None,
                **example.template_kwargs,
            )
        except _REFUSALS as error:
            raise RowProblem("", f"the chat template refuses these messages: {error}") from error


def make_chat(tokenizer: Any, *, template: str = "auto", stop: str = "auto") -> Chat:
    """How this tokenizer writes conversations, found by rendering a probe.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: ``auto`` is the tokenizer's chat template, or raw text where it has none; ``none`` is raw text; else
            the path of a Jinja file.
        stop: ``auto`` is the token that ends a turn in the template, or the end-of-sequence token; else a token.

    Raises:
        UserError: the template refuses a plain conversation, or there is no token that ends a response.
    """
    own = tokenizer.chat_template is not None if template == "auto" else template != "none"
    source = None if template in ("auto", "none") else _read_template(template)
    tail = _turn_tail(tokenizer, source) if own else ""
    end_id = _end_id(tokenizer, tail, stop)
    end_text = str(tokenizer.convert_ids_to_tokens(end_id))
    return Chat(
        tokenizer=tokenizer,
        has_template=own,
        template=source,
        end_id=end_id,
        end_text=end_text,
        after_end=tail.partition(end_text)[2] if end_text in tail else tail,
        lead_ids=_lead_ids(tokenizer),
        splits_cleanly=_splits_cleanly(tokenizer),
    )


def closing_template(chat: Chat) -> str | None:
    """The chat template, but a conversation ends with the end token of its last answer; None for raw text.

    Many templates write a line end after it, and one that writes no end token gets it: a text then ends where a
    tokenized candidate does.
    """
    if not chat.has_template:
        return None
    source = chat.template or str(chat.tokenizer.get_chat_template())
    tail = _turn_tail(chat.tokenizer, chat.template)
    closing = tail[: len(tail) - len(chat.after_end)] or chat.end_text
    if closing == tail:
        return source
    return (
        f"{{% set conversation %}}{source.removesuffix(chr(10))}{{% endset %}}"
        "{% if not add_generation_prompt and messages[-1].role == 'assistant' and conversation.endswith("
        f"{tail!r}) %}}{{{{ conversation[:(conversation | length) - {len(tail)}] + {closing!r} }}}}"
        "{% else %}{{ conversation }}{% endif %}"
    )


def _read_template(path: str) -> str:
    with open_binary(path) as stream:
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.template: {path} is no text in UTF-8") from error


def _turn_tail(tokenizer: Any, template: str | None) -> str:
    """What the template writes after an answer."""
    probe = (*user(_PROBE), *assistant(_PROBE))
    try:
        whole = _apply(tokenizer, template, probe, False)
    except _REFUSALS as error:
        raise UserError(f"the chat template refuses one user turn and one assistant turn: {error}") from error
    before, found, tail = whole.rpartition(_PROBE)
    if not found or _PROBE not in before:
        raise UserError("the chat template does not write what was said; name another in data.template")
    return tail


def _end_id(tokenizer: Any, tail: str, stop: str) -> int:
    if stop != "auto":
        (ids,) = _encode(tokenizer, [stop])
        if len(ids) != 1:
            raise UserError(f"data.stop: {stop!r} is {len(ids)} tokens of this tokenizer; name one token")
        return ids[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    (ids,) = _encode(tokenizer, [tail])
    ends = next((token for token in ids if token in special), tokenizer.eos_token_id)
    if ends is None:
        raise UserError("the tokenizer has no end-of-sequence token; name the token that ends a response in data.stop")
    return int(ends)


def _lead_ids(tokenizer: Any) -> tuple[int, ...]:
    (dressed,) = _encode(tokenizer, [_PROBE], add_special_tokens=True)
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and dressed[:1] == [bos] else ()


def _splits_cleanly(tokenizer: Any) -> bool:
    texts = ["Yes", " yes", "1"]
    alone = _encode(tokenizer, texts)
    after = _encode(tokenizer, ["\n" + text for text in texts])
    return all(whole[-len(ids) :] == ids for ids, whole in zip(alone, after, strict=True))


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    if not texts:
        return []
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _apply(tokenizer: Any, template: str | None, turns: Turns, generation_prompt: bool, **kwargs: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(turns),
            chat_template=template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **kwargs,
        )
    )
