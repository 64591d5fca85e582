"""A completion as text: one rule for scorers, judges and people, wherever a completion is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_OPENED = re.compile(
    r"(?:<(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning)>|\[THINK\]|◁think▷"
    r"|<\|(?:think|START_THINKING|begin_of_thought)\|>)\s*\Z",
    re.IGNORECASE,
)
_TAIL_TOKENS = 32
"""How much of a prompt is looked at: no thought's opening is longer."""


def reply_text(tokenizer: Any, ids: Sequence[int], *, finished: bool, prompt_ids: Sequence[int]) -> str:
    """What a completion's tokens spell: special tokens and white space too, but without the one end token.

    Where the prompt ends in an opened thought, as the generation prompts of DeepSeek-R1's distillates do, the reply
    begins with that opening: a thought is whole, whether the prompt or the model opened it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the completion's tokens; of a ``finished`` one the last is its end token.
        prompt_ids: the tokens that it continues.
    """
    opened = _OPENED.search(_decoded(tokenizer, prompt_ids[-_TAIL_TOKENS:]))
    return (opened[0] if opened else "") + _decoded(tokenizer, ids[:-1] if finished else ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
