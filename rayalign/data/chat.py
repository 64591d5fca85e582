"""A tokenizer and how conversations are written in its tokens: the only place that knows both.

The text of an example comes from :mod:`rayalign.data.render`. A candidate's text is tokenized apart from the prompt, as
a rollout continues the prompt's token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend

from rayalign.data.files import open_binary
from rayalign.data.marks import Marks
from rayalign.data.render import Rendered, render_example
from rayalign.data.said import Endings, Speaker
from rayalign.data.schema import Example, RowProblem, user
from rayalign.data.spelled import SHIELD, ControlTokens, control_tokens
from rayalign.data.template import PROBE, TODAY, Template, TemplateContext, find_forms, turn_tail
from rayalign.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Made by :func:`make_chat`."""

    tokenizer: Any
    speaker: Speaker
    marks: Marks
    end_id: int
    """The one token that ends a response where the template writes none: training appends it, rollouts stop at it."""
    lead_ids: tuple[int, ...]
    """What the tokenizer puts in front of raw text: one beginning-of-sequence token, or nothing."""
    leads: bool
    """True where a space is put before a text, but not before one that follows a control token."""
    splits_cleanly: bool
    """True where a text has the same tokens alone as after a line end, so that nothing needs context."""
    rendered: bool
    """``template: none``: texts of rows are rendered already, and control tokens in them count."""

    @property
    def has_template(self) -> bool:
        return self.speaker.template.exists

    @property
    def end_text(self) -> str:
        return self.speaker.endings.run

    @property
    def after_end(self) -> str:
        """What the template writes after an answer that is no part of it, such as a line end."""
        return self.speaker.endings.after

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids of every text, without special tokens of the tokenizer's own."""
        unique = list(dict.fromkeys(texts))
        plain = [text for text in unique if SHIELD not in text]
        ids = dict(zip(plain, _encode(self.tokenizer, plain), strict=True))
        ids |= {text: self._encode_shielded(text) for text in unique if SHIELD in text}
        return {text: ids[text] for text in unique}

    def encode_after(self, text: str) -> list[int]:
        """Token ids of a text that stands after another, without the space that some tokenizers put before every text.

        The other text's own last tokens would change with it, so that it is tokenized after something else.
        """
        return self._encode_shielded(text) if SHIELD in text else _encode_one(self.tokenizer, text, follows=True)

    def render(self, example: Example, *, completed: bool = False) -> Rendered:
        """The texts of one example; ``completed``: fresh answers will follow the same prompt.

        Raises:
            RowProblem: the template refuses its turns or leaves something out, or a text is rendered already.
        """
        return render_example(example, self.speaker, self.marks, rendered=self.rendered, completed=completed)

    def _encode_shielded(self, text: str) -> list[int]:
        """Token ids of a text in which words spell control tokens: only those that the template wrote are such."""
        ids: list[int] = []
        for segment in self.speaker.endings.controls.segments(text):
            words, spelled = segment.replace(SHIELD, ""), SHIELD in segment
            ids += _encode_one(self.tokenizer, words, split_special_tokens=spelled, follows=bool(ids) and self.leads)
        return ids


def make_chat(
    tokenizer: Any,
    *,
    template: str = "auto",
    stop: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    date: date = TODAY,
) -> Chat:
    """How this tokenizer writes conversations, found by rendering probes.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: ``auto`` is the tokenizer's chat template, or raw text where it has none; ``none`` is raw text that
            is rendered already; else the path of a Jinja file.
        stop: ``auto`` is the token that ends a turn in the template, or the end-of-sequence token; else a token.
        template_kwargs: variables of the template, such as ``enable_thinking``; a row's own win.
        date: what templates write that ask for today's date.

    Raises:
        UserError: the template refuses a plain conversation or does not read a variable, or there is no token that
            ends a response.
    """
    exists = tokenizer.chat_template is not None if template == "auto" else template != "none"
    source = None if template in ("auto", "none") else _read_template(template)
    written = Template(
        tokenizer=tokenizer, exists=exists, source=source, variables=dict(template_kwargs or {}), date=date
    )
    if exists and (unread := written.unread(list(written.variables))):
        raise UserError(
            f"data.chat_template_kwargs: the chat template does not read {', '.join(unread)}; leave it out, or name "
            "another template in data.template"
        )
    written = replace(written, forms=find_forms(written))
    tail = turn_tail(written)
    header, opening = _turn_parts(written)
    controls = control_tokens(tokenizer, tags=written.tags, user_header=header, opening=opening)
    own, after = _split_tail(tail, tokenizer, controls)
    controls = controls.after_turn(own)
    end_id = _end_id(tokenizer, own, stop)
    endings = Endings(run=str(tokenizer.convert_ids_to_tokens(end_id)), own=own, after=after, controls=controls)
    speaker = Speaker(template=written, endings=endings, encode=partial(_encode_one, tokenizer), asks=opening)
    return Chat(
        tokenizer=tokenizer,
        speaker=speaker,
        marks=Marks(speaker),
        end_id=end_id,
        lead_ids=_lead_ids(tokenizer),
        leads=_leads(tokenizer, own),
        splits_cleanly=_splits_cleanly(tokenizer),
        rendered=template == "none",
    )


def _read_template(path: str) -> str:
    with open_binary(path) as stream:
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.template: {path} is no text in UTF-8") from error


def _split_tail(tail: str, tokenizer: Any, controls: ControlTokens) -> tuple[str, str]:
    """(what ends an answer, what comes after that), of what the template writes after one; the first may be empty.

    The first added token ends it, unless it closes what the generation prompt opened for the answer alone, as
    ``<|END_RESPONSE|>`` does.
    """
    added = {*map(str, tokenizer.all_special_tokens), *map(str, tokenizer.get_added_vocab())} - {""}
    found = sorted((tail.index(token), -len(token), token) for token in added if token in tail)
    ends = [(start, token) for start, _, token in found if not controls.closes_response(token)]
    if not ends:
        return "", tail
    start, token = ends[0]
    end = start + len(token)
    return tail[:end], tail[end:]


def _end_id(tokenizer: Any, own: str, stop: str) -> int:
    if stop != "auto":
        ids = _encode_one(tokenizer, stop)
        if len(ids) != 1:
            raise UserError(f"data.stop: {stop!r} is {len(ids)} tokens of this tokenizer; name one token")
        return ids[0]
    ends = _encode_one(tokenizer, own)[-1] if own else tokenizer.eos_token_id
    if ends is None:
        raise UserError("the tokenizer has no end-of-sequence token; name the token that ends a response in data.stop")
    return int(ends)


def _turn_parts(template: Template) -> tuple[str, str]:
    """What the template writes before a user's words, and before an answer; empty for transcripts."""
    if not template.exists:
        return "", ""
    try:
        asked = template.write(user(PROBE), TemplateContext(), generation_prompt=False)
        waiting = template.write(user(PROBE), TemplateContext(), generation_prompt=True)
    except RowProblem as problem:
        raise UserError(f"{problem.reason}, a question alone; name another in data.template") from problem
    return asked.rpartition(PROBE)[0], waiting.removeprefix(asked)


def _lead_ids(tokenizer: Any) -> tuple[int, ...]:
    (dressed,) = _encode(tokenizer, [PROBE], add_special_tokens=True)
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and dressed[:1] == [bos] else ()


def _splits_cleanly(tokenizer: Any) -> bool:
    texts = ["Yes", " yes", "1"]
    alone = _encode(tokenizer, texts)
    after = _encode(tokenizer, ["\n" + text for text in texts])
    return all(whole[-len(ids) :] == ids for ids, whole in zip(alone, after, strict=True))


def _leads(tokenizer: Any, end: str) -> bool:
    alone, after = _encode_one(tokenizer, "Yes"), _encode_one(tokenizer, end + "Yes")
    return bool(end) and after[-len(alone) :] != alone


def _encode_one(tokenizer: Any, text: str, *, split_special_tokens: bool = False, follows: bool = False) -> list[int]:
    """Token ids of one text; control tokens in it are text or not. ``follows``: as the text is after another one."""
    for before in ("\n", "a", ".") if follows else ():
        head, whole = _encode(tokenizer, [before, before + text], split_special_tokens=split_special_tokens)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _encode(tokenizer, [text], split_special_tokens=split_special_tokens)[0]


def _encode(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, **options}
    if is_plain_backend(tokenizer):
        return _encode_fast(tokenizer.backend_tokenizer, texts, **options)
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
    )
    return encoded["input_ids"]


def is_plain_backend(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer is a call of its Rust backend and nothing else."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is TokenizersBackend.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
    )


def _encode_fast(
    backend: Tokenizer, texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids. The places of tokens in their text are not read, and would cost a sixth more."""
    backend.no_truncation()
    backend.no_padding()
    if backend.encode_special_tokens != split_special_tokens:
        backend.encode_special_tokens = split_special_tokens
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
