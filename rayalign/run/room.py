"""Whether every group fits into a micro-batch: stored ones by their lengths, drawn ones by what they may take."""

from __future__ import annotations

import contextlib

from rayalign.config.candidates import Drawing
from rayalign.config.run import RunConfig
from rayalign.data.group import GroupLengths
from rayalign.data.micro_batches import check_budget
from rayalign.data.rows import Layout, rows_needed
from rayalign.data.store import TokenStore
from rayalign.engine.model.loading import META
from rayalign.engine.model.parity import choose_attention
from rayalign.engine.model.pretrained import CPU, ModelSpec, load_model
from rayalign.errors import UserError
from rayalign.rounds.streams import MixedStream, RoundStream, SourceSpec, StoredStream


def refuse_large_groups(run: RunConfig, source: SourceSpec) -> None:
    """Raise UserError where a group of a stream is, or may come, above ``optim.tokens_per_micro_batch``.

    The numbers and the settings to change are in the message. Training workers look once more at what is stored, in the
    layout that the model is then proven to read.
    """
    layout = expected_layout(run)
    for stream in source.streams:
        parts = (stream.fresh, stream.stored) if isinstance(stream, MixedStream) else (stream,)
        for part in parts:
            if isinstance(part, StoredStream):
                for store in part.stores:
                    check_budget(
                        TokenStore.open(store),
                        tokens_per_micro_batch=source.tokens_per_micro_batch,
                        row_tokens=source.row_tokens,
                        layout=layout,
                    )
            elif run.drawing is not None:
                refuse_large_rounds(run.drawing, part, source, layout)


def refuse_large_rounds(drawing: Drawing, stream: RoundStream, source: SourceSpec, layout: Layout) -> None:
    """Raise UserError where the longest prompt with its completions at their limit is too large."""
    tokens, limit = 0, source.tokens_per_micro_batch
    told = ""
    for path in stream.prompts.stores:
        store = TokenStore.open(path)
        row = store.index.longest_prompt()
        prompt, longest = store.lengths(row).prompt, drawing.rollout.max_new_tokens
        if drawing.policy.keeps_stored:
            longest = max(longest, *(int(piece.candidate_tokens.max(initial=0)) for piece in store.index.pieces()))
        candidates = (longest,) * stream.num_candidates
        lengths = GroupLengths(prompt=prompt, candidates=candidates, predicted=candidates)
        rows, length = rows_needed([lengths], row_tokens=source.row_tokens, layout=layout)
        if rows * length > tokens:
            tokens = rows * length
            told = (
                f"{stream.num_candidates} completions of up to {longest} tokens for the prompt of {prompt} at "
                f"{store.index.name(row)}"
            )
    if tokens > limit:
        fewer = "rollout.samples, " if stream.num_candidates > 2 else ""
        raise UserError(
            f"optim.tokens_per_micro_batch: {limit} is too small for what may be drawn: {told} take {tokens} tokens of "
            f"a micro-batch. Raise it to at least {tokens}, or lower {fewer}rollout.max_new_tokens or "
            "data.max_prompt_tokens"
        )


def expected_layout(run: RunConfig) -> Layout:
    """How the model is read here, on a CPU; one that cannot be read is refused where it is loaded."""
    with contextlib.suppress(UserError):
        return choose_attention(load_model(ModelSpec(config=run.model), place=META), device=CPU).layout
    return "packed"
