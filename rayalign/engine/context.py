"""How many tokens a model reads, and which: what is beyond is refused before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from rayalign.data.index import Counts, Index
from rayalign.data.store import TokenStore
from rayalign.errors import UserError

LIMITS = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
"""What configurations call the number of positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Prompt and response of one sequence together."""

    tokens: int
    reason: str
    """Where the number comes from, for messages."""
    rope: str = "default"
    """The type of the RoPE that it comes from."""


def context_of(config: PretrainedConfig) -> Context | None:
    """What a model reads at most; None where its configuration has no limit, as of recurrent models and ALiBi.

    RoPE that is stretched by a factor reaches that much further. Where its frequencies depend on the length of the
    longest sequence in a batch (``dynamic``, ``longrope``), the limit is the length up to which they are constant:
    beyond it a sequence would have other log-probabilities in other company.
    """
    text = config.get_text_config()
    name = next((name for name in LIMITS if isinstance(getattr(text, name, None), int)), None)
    if name is None or getattr(text, "alibi", False) is True:
        return None
    positions = int(getattr(text, name))
    found = [reach(rope, positions, name) for rope in ropes(text)]
    return min(found or [Context(tokens=positions, reason=name)], key=lambda one: one.tokens)


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of tokens that a model has an embedding for, in each of its embeddings."""
    rows = int(model.get_input_embeddings().num_embeddings)
    other = getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None)  # Gemma 3n has a second one
    return min(rows, other or rows)


def ropes(config: PretrainedConfig) -> Iterator[MutableMapping[str, Any]]:
    """The settings of every RoPE of a model: one, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, MutableMapping):
        return
    nested = [own for own in settings.values() if isinstance(own, MutableMapping) and "rope_type" in own]
    yield from nested or ([settings] if "rope_type" in settings else [])


def reach(rope: Mapping[str, Any], positions: int, name: str) -> Context:
    """How far one RoPE goes."""
    kind, factor = rope["rope_type"], float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope" and original:
        reason = "original_max_position_embeddings; beyond it longrope depends on the longest sequence of a batch"
        return Context(tokens=min(int(original), positions), reason=reason, rope=kind)
    if kind == "dynamic":
        reason = f"{name}; beyond it dynamic RoPE depends on the longest sequence of a batch"
        return Context(tokens=positions, reason=reason, rope=kind)
    stretched = {"yarn": (original or positions) * factor, "linear": positions * factor}.get(kind, positions)
    if stretched <= positions:
        return Context(tokens=positions, reason=name)
    return Context(tokens=int(stretched), reason=f"{name}, stretched by {kind} RoPE", rope=kind)


def refuse_long_rows(store: TokenStore, context: Context | None, model: str, *, new_tokens: int = 0) -> None:
    """Raise UserError where a row of a store is longer than ``model`` reads, by the row's name.

    With ``new_tokens`` completions of so many tokens are drawn for the prompts.
    """
    if context is None or not len(store):
        return
    lengths = store.index.prompt_tokens + new_tokens if new_tokens else longest(store.index)
    beyond = int((lengths > context.tokens).sum())
    if not beyond:
        return
    row = int(lengths.argmax())
    others = f" ({beyond} rows are too long; this is the longest)" if beyond > 1 else ""
    has = f"{store.index.name(row)} has {lengths[row] - new_tokens} tokens"
    if new_tokens:
        room = context.tokens - new_tokens
        remedy = f"data.max_prompt_tokens to {room} or " if room > 0 else ""
        raise UserError(
            f"{has} and rollout.max_new_tokens are {new_tokens}, more than the {context.tokens} that {model} reads "
            f"({context.reason}){others}: lower {remedy}rollout.max_new_tokens"
        )
    raise UserError(
        f"{has}, prompt and response together, and {model} reads {context.tokens} ({context.reason}){others}: lower "
        f"data.max_tokens to {context.tokens}, or name a model that reads more"
    )


def longest(index: Index) -> Counts:
    """The tokens of each group's longest sequence: the prompt with one of its candidates."""
    most = np.zeros(len(index), np.int64)
    np.maximum.at(most, np.repeat(np.arange(len(index)), index.num_candidates), index.candidate_tokens)
    return index.prompt_tokens + most


def refuse_unknown_tokens(store: TokenStore, vocabulary: int, model: str, tokenizer: Any) -> None:
    """Raise UserError where a row has a token that ``model``'s embedding of ``vocabulary`` rows does not have.

    No row is read where the tokenizer has no such token.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocabulary:
        return
    for row in range(len(store)):
        group = store[row]
        refuse_unknown_ids(
            [*group.prompt_ids.tolist(), *(token for own in group.candidates for token in own.ids.tolist())],
            vocabulary,
            model,
            tokenizer,
            name=store.index.name(row),
        )


def refuse_unknown_ids(ids: Sequence[int], vocabulary: int, model: str, tokenizer: Any, *, name: str) -> None:
    """Raise UserError where one of the tokens of the text ``name`` is beyond the embedding."""
    unknown = next((token for token in ids if token >= vocabulary), None)
    if unknown is not None:
        raise UserError(
            f"{name} has the token {tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown}), and the embedding of "
            f"{model} has {vocabulary} rows: the tokenizer was extended and the model was not. Save the model after "
            "model.resize_token_embeddings(len(tokenizer)), or name the tokenizer's own model"
        )


def refuse_long_prompt(tokens: int, new_tokens: int, context: Context | None) -> None:
    """Raise UserError where a prompt and its completion are more than a model reads."""
    if context is not None and tokens + new_tokens > context.tokens:
        raise UserError(
            f"a prompt of {tokens} tokens and {new_tokens} new ones (max_new_tokens) are more than the model's context "
            f"of {context.tokens} ({context.reason}): shorten the prompt (data.max_prompt_tokens) or lower "
            "max_new_tokens"
        )
