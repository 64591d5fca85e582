"""Control tokens in somebody's words: they are words there. A text that is rendered already is noticed by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayalign.data.schema import RowProblem

THOUGHT_TAGS: Mapping[str, str] = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
"""What begins a thought that an answer spells → what ends it. Special or not, these are tokens in answers."""
SHIELD = "\U0010fffd"
"""Stands inside a control token that is a word; the last character of Unicode's private use, which no text contains."""
_HEADERS = (
    r"<\|im_start\|>\s*(?:system|user|assistant|tool|developer)",
    r"<\|start_header_id\|>",
    r"<\|header_start\|>",
    r"<start_of_turn>\s*(?:user|model)",
    r"<\|turn>\s*(?:user|model|system)",
    r"\[/?INST\]",
    r"<<SYS>>",
    r"<\|(?:user|assistant|system|User|Bot)\|>",
    r"<｜(?:User|Assistant)｜>",
    r"<\|start\|>\s*(?:user|assistant|system|developer)",
    r"<\|START_OF_TURN_TOKEN\|>",
    r"\[\|(?:user|assistant|system)\|\]",
    r"<\|start_of_role\|>",
)
_RENDERED = re.compile("|".join(_HEADERS))
"""How the turns of well-known families begin."""
_ASKED = re.compile(r"USER:|### (?:Instruction|Human|User):")
_WAITS = ("ASSISTANT:", "### Response:", "### Assistant:")
"""Prompts of families that write turns in plain words (Vicuna, Alpaca): somebody asks, and they wait for an answer."""


_TAG_OF_USER = re.compile(
    r"<[^<>\s]{0,30}(?:user|human|prompter|用户|reserved_106)[^<>\s]{0,20}>|[>\]]\s*(?:user|human)\b", re.IGNORECASE
)
_TAG_OF_ASSISTANT = re.compile(
    r"(?:<[^<>\s]{0,30}(?:assistant|bot|gpt|ai|reserved_107)[^<>\s]{0,20}>|[>\]]\s*(?:assistant|ai|bot|gpt)\b[^\n<>]{0,30})"
    r"(?:<[^<>\s]{1,30}>)?\s*:?\s*\Z",
    re.IGNORECASE,
)
"""Any tag that names who speaks, or that stands before the name: a text that ends in one waits for an answer."""
_WORD_OF_USER = re.compile(
    r"(?:^|[.:!>]\s*)(?:\w+ ){0,3}(?:user|human|instruct|问)\s*[:：]", re.IGNORECASE | re.MULTILINE
)
_WORD_OF_ASSISTANT = re.compile(r"(?:^|[\s>])(?:assistant|gpt|bot|ai|output|答)\s*[:：]\s*\Z", re.IGNORECASE)
"""The same in plain words, which count where a text is a prompt by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTokens:
    """The special tokens of a tokenizer, and how one of its rendered conversations differs from plain text."""

    special: re.Pattern[str] | None
    """Every special token; None where there is none."""
    words: re.Pattern[str] | None
    """Those that a writer never means: all but a thought's."""
    ends: re.Pattern[str] | None
    """What may end an answer: special tokens, and what the template writes like one."""
    user_header: str
    """What the template writes before a user's words, without a token that begins the text."""
    opening: str
    """What it writes before an answer."""
    begin: str
    """The token that begins a text; empty: none."""

    def after_turn(self, end: str) -> ControlTokens:
        """The same where a user's turn begins after ``end``: some templates write words of their own before it."""
        header = self.user_header.rpartition(end)[2] if end else self.user_header
        return replace(self, user_header=header.strip() or self.user_header)

    def shield(self, value: Any) -> Any:
        """The value in whose texts control tokens are broken, so that a tokenizer takes them for text."""
        return _mapped(value, lambda text: self.words.sub(_broken, text) if self.words is not None else text)

    def restore(self, value: Any) -> Any:
        """The value as it was before :meth:`shield`."""
        return _mapped(value, lambda text: text.replace(SHIELD, ""))

    def segments(self, text: str) -> Iterator[str]:
        """Special tokens and what stands between them."""
        assert self.special is not None
        end = 0
        for match in self.special.finditer(text):
            yield from (part for part in (text[end : match.start()], match[0]) if part)
            end = match.end()
        if end < len(text):
            yield text[end:]

    def last(self, text: str) -> str:
        """The control token that the text ends in; empty: none."""
        return next((match[0] for match in reversed(self._matches(text)) if match.end() == len(text)), "")

    def after_last(self, text: str, limit: int) -> int:
        """Where the last special token ends that ends at or before ``limit``; 0 where there is none."""
        matches = self.special.finditer(text, 0, limit) if self.special is not None else ()
        return max((match.end() for match in matches), default=0)

    def closes(self, token: str, text: str) -> bool:
        """Whether ``token`` closes what a token in ``text`` opens, as ``<|call_end|>`` closes ``<|call_begin|>``."""
        return any(match[0] != token and _core(match[0]) == _core(token) for match in self._matches(text))

    def begins_turn(self, text: str) -> bool:
        """Whether the text holds a control token that begins a user's turn."""
        return any(match[0] in text for match in self._matches(self.user_header))

    def closes_response(self, token: str) -> bool:
        """Whether ``token`` closes what opens an answer and no other turn."""
        return self.closes(token, self.opening) and not self.closes(token, self.user_header)

    def _matches(self, text: str) -> list[re.Match[str]]:
        return list(self.ends.finditer(text)) if self.ends is not None else []

    def refuse_rendered(self, text: str, *, end: str = "", may_begin: bool = False, is_prompt: bool = False) -> None:
        """Raise :class:`RowProblem` where the words are a rendered conversation, or end in the ``end`` token.

        ``may_begin``: they may start with the token that begins a text. ``is_prompt``: they are a whole prompt, in
        which a transcript that waits for an answer is one.
        """
        found = self._rendered(text.removeprefix(self.begin) if may_begin else text, is_prompt=is_prompt)
        if found:
            raise RowProblem(
                "",
                f"the text is rendered already: it holds {found!r}. Write turns or plain text, or data.template: none, "
                "which takes rendered texts as they are",
            )
        if end and text.rstrip().endswith(end):
            raise RowProblem(
                "",
                f"an answer spells the end token {end!r} at its end: take it out, it is added. Where rows are rendered "
                "already, write data.template: none",
            )

    def _rendered(self, text: str, *, is_prompt: bool) -> str:
        waits = text.rstrip().endswith(_WAITS)
        if match := _RENDERED.search(text) or (_ASKED.search(text) if waits else None):
            return match[0]
        if (waiting := _TAG_OF_ASSISTANT.search(text)) and _TAG_OF_USER.search(text):
            return waiting[0].strip()
        if is_prompt and (waiting := _WORD_OF_ASSISTANT.search(text)) and _WORD_OF_USER.search(text):
            return waiting[0].strip()
        words = text.strip()
        if self.begin and words.startswith(self.begin):
            return self.begin
        if not self.user_header:
            return ""
        if re.search(r"[<\[]", self.user_header):
            return self.user_header if self.user_header in text else ""
        asked = self.opening and words.startswith(self.user_header) and words.endswith(self.opening)
        return self.user_header if asked else ""


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if isinstance(value, list | tuple) else value


def _broken(match: re.Match[str]) -> str:
    return match[0][0] + SHIELD + match[0][1:]


def _core(token: str) -> str:
    """A control token's name without what tells the opening from the closing one."""
    return re.sub(r"[\W_]|begin|start|end", "", token.lower())


def control_tokens(
    tokenizer: Any, *, tags: Collection[str] = (), user_header: str = "", opening: str = ""
) -> ControlTokens:
    """The control tokens of a tokenizer whose template writes ``tags``, and ``user_header`` and ``opening``."""
    added = (str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""})
    thoughts = {*THOUGHT_TAGS, *THOUGHT_TAGS.values()}
    begin = str(tokenizer.bos_token or "")
    return ControlTokens(
        special=_any(special),
        words=_any([token for token in special if token not in thoughts]),
        ends=_any([*special, *(tag for tag in tags if tag.startswith("<|") or tag.endswith("|>"))]),
        user_header=user_header.removeprefix(begin).strip(),
        opening=opening.strip(),
        begin=begin,
    )


def _any(tokens: list[str]) -> re.Pattern[str] | None:
    return re.compile(_branches(tokens)) if tokens else None


def _branches(words: Collection[str]) -> str:
    """A pattern of any of the words, the longest first; a tree, since some tokenizers have a thousand of them."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    branches = [re.escape(first) + _branches(rest) for first, rest in rests.items() if first]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in rests else ''}"
