"""Pairs as TRL reads them: the arithmetic of its tokenization, written a second time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class TrlRow(NamedTuple):
    """A row as TRL reads it."""

    prompt: list[int]
    candidates: tuple[list[int], list[int]]


def read_by_trl(row: Mapping[str, Any], tokenizer: Any) -> TrlRow:
    """The tokens of a row as TRL 1.16's ``DPOTrainer`` makes them: the completion begins where renderings part."""
    if isinstance(row["prompt"], str):
        eos = tokenizer.eos_token
        answers = [row[name].removesuffix(eos) + eos for name in ("chosen", "rejected")]
        prompt = tokenizer(row["prompt"])["input_ids"]
        wholes = [tokenizer(row["prompt"] + answer)["input_ids"] for answer in answers]
    else:
        options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {}), "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
        wholes = [
            tokenizer.apply_chat_template(row["prompt"] + row[name], **options) for name in ("chosen", "rejected")
        ]
    length = min(_shared(prompt, whole) for whole in wholes)
    return TrlRow(prompt[:length], (wholes[0][length:], wholes[1][length:]))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))
