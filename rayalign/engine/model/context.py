"""How many tokens a model reads, and which: what is beyond is refused before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rayalign.data.group import Group
from rayalign.data.store import TokenStore
from rayalign.errors import UserError

LIMITS = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
"""What configurations call the number of positions."""
DRAWN = "rollout.max_new_tokens"


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
    found = [rope_reach(rope, positions, name) for rope in rope_settings(text)]
    return min(found or [Context(tokens=positions, reason=name)], key=lambda one: one.tokens)


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of tokens that a model has an embedding for, in each of its embeddings."""
    rows = int(model.get_input_embeddings().num_embeddings)
    other = getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None)  # Gemma 3n has a second one
    return min(rows, other or rows)


def rope_settings(config: PretrainedConfig) -> Iterator[MutableMapping[str, Any]]:
    """The settings of every RoPE of a model: one, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None)
    if not isinstance(settings, MutableMapping):
        return
    nested = [own for own in settings.values() if isinstance(own, MutableMapping) and "rope_type" in own]
    yield from nested or ([settings] if "rope_type" in settings else [])


def rope_reach(rope: Mapping[str, Any], positions: int, name: str) -> Context:
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
    beyond, worst, row = 0, 0, 0
    for piece in store.index.pieces():
        lengths = piece.prompt_tokens + new_tokens if new_tokens else piece.longest
        beyond += int((lengths > context.tokens).sum())
        if lengths.max() > worst:
            worst, row = int(lengths.max()), piece.first + int(lengths.argmax())
    if not beyond:
        return
    others = f" ({beyond} rows are too long; this is the longest)" if beyond > 1 else ""
    raise too_long(store.index.name(row), worst - new_tokens, context, model, new_tokens=new_tokens, others=others)


def refuse_long_group(
    group: Group,
    context: Context | None,
    model: str,
    *,
    new_tokens: int = 0,
    setting: str = "data.max_tokens",
    drawn: str = DRAWN,
) -> None:
    """The same of one row; ``setting`` is what cuts it, and ``drawn`` says how many tokens are."""
    if context is None:
        return
    answers = [len(own.ids) for own in group.candidates] if not new_tokens else [0]
    tokens = len(group.prompt_ids) + max(answers, default=0)
    if tokens + new_tokens > context.tokens:
        name = f"{group.source}:{group.line}"
        raise too_long(name, tokens, context, model, new_tokens=new_tokens, setting=setting, drawn=drawn)


def too_long(
    name: str,
    tokens: int,
    context: Context,
    model: str,
    *,
    new_tokens: int,
    others: str = "",
    setting: str = "data.max_tokens",
    drawn: str = DRAWN,
) -> UserError:
    """The row ``name`` has more than ``model`` reads; with ``new_tokens`` it is a prompt."""
    if new_tokens:
        room = context.tokens - new_tokens
        remedy = f"data.max_prompt_tokens to {room} or " if room > 0 else ""
        return UserError(
            f"{name} has {tokens} tokens and {drawn} are {new_tokens}, more than the {context.tokens} that {model} "
            f"reads ({context.reason}){others}: lower {remedy}{drawn}"
        )
    return UserError(
        f"{name} has {tokens} tokens, prompt and response together, and {model} reads {context.tokens} "
        f"({context.reason}){others}: lower {setting} to {context.tokens}, or name a model that reads more"
    )


def refuse_unknown_tokens(store: TokenStore, vocabulary: int, model: str, tokenizer: Any) -> None:
    """Raise UserError where a row has a token that ``model``'s embedding of ``vocabulary`` rows does not have.

    No row is read where the tokenizer has no such token.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocabulary:
        return
    for row in range(len(store)):
        refuse_unknown_group(store[row], vocabulary, model, tokenizer, name=store.index.name(row))


def refuse_unknown_group(group: Group, vocabulary: int, model: str, tokenizer: Any, *, name: str = "") -> None:
    """The same of one row, which goes by its source and line."""
    parts = [group.prompt_ids, *(own.ids for own in group.candidates)]
    if max(int(part.max(initial=0)) for part in parts) >= vocabulary:
        ids = list(chain.from_iterable(part.tolist() for part in parts))
        refuse_unknown_ids(ids, vocabulary, model, tokenizer, name=name or f"{group.source}:{group.line}")


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
