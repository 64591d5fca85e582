"""The streams that a run trains on, by its data policy, each made by the stages that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from rayalign.config.candidates import Drawing
from rayalign.config.data import DataSource, FilterConfig
from rayalign.config.run import RunConfig
from rayalign.data.select import rows_file
from rayalign.data.store import TokenStore
from rayalign.engine.objective import MAIN_STREAM
from rayalign.errors import UserError
from rayalign.report.formatting import filter_sentence
from rayalign.rounds.chunk import ChunkSpec
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.stored import opened_order
from rayalign.rounds.streams import AnyStream, MixedStream, RoundStream, SourceSpec, StoredStream
from rayalign.run.model import model_spec, scoring_spec
from rayalign.run.readers import refuse_unreadable
from rayalign.run.reads import COLUMN_FIELDS, needed_columns, shape_of, with_format
from rayalign.run.rollouts import (
    drawn_once,
    drawn_spec,
    kept_candidates,
    preparation,
    prompt_store,
    prompt_stream,
    refuse_unlabelled,
    relabelled,
    round_plan,
)
from rayalign.run.stages import Stages, filter_facts
from rayalign.storage.place import Place

UNITS = {"one": "completions", "pair": "pairs", "group": "groups", "labelled": "examples"}
"""What a filter counts, by what a method learns from; of what is labelled again, not every group becomes a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRounds:
    """Rounds that are drawn while the run trains."""

    drawing: Drawing
    chunks: ChunkSpec
    stream: RoundStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Main:
    """The stream of the method itself."""

    stream: AnyStream
    steps: int
    """Steps of the run."""
    rounds: DrawnRounds | None = None
    """None where every group is stored before the first step."""


def main_stream(run: RunConfig, stages: Stages, folder: Place) -> Main:
    """Stored, fresh or both; what is drawn once is drawn here, what is drawn in rounds will lie in ``folder``."""
    if run.drawing is None:
        stored = stored_main(run, stages)
        return Main(stream=stored, steps=steps_of_stream(run, stored))
    return drawn_main(run.drawing, run, stages, folder)


def stored_main(run: RunConfig, stages: Stages) -> StoredStream:
    """The stored groups that the method trains on."""
    stored = stored_stream(run, run.data.train, stages, groups_per_step=run.optim.groups_per_step)
    return keep_filtered(stored, run, stages)


def drawn_main(drawing: Drawing, run: RunConfig, stages: Stages, folder: Place) -> Main:
    """Groups that the policy draws, or these and stored ones."""
    policy = drawing.policy
    prompts = prompt_stream(drawing, run, stages)
    if policy.keeps_stored:  # their scores will be known; who wrote them, only the data can say
        for path in prompts.stores:
            require_columns(run, "mix: candidates", TokenStore.open(path), among=("behavior_logp",))
    stored = stored_main(run, stages) if policy.fresh_fraction < 1 else None
    steps = steps_of_stream(run, stored or prompts)
    rounds = None
    fresh: StoredStream | RoundStream
    if isinstance(policy.refresh_every, int):
        plan = round_plan(drawing, run, refresh_every=policy.refresh_every, steps=steps)
        rounds = drawn_rounds(drawing, run, prompts, plan, stages, folder)
        fresh = rounds.stream
    else:
        fresh = drawn_before(drawing, run, prompts, stages)
    if stored is None:
        return Main(stream=fresh, steps=steps, rounds=rounds)
    mixed = MixedStream(
        name=MAIN_STREAM,
        fresh=fresh,
        stored=stored,
        fresh_fraction=policy.fresh_fraction,
        groups_per_step=run.optim.groups_per_step,
    )
    return Main(stream=mixed, steps=steps, rounds=rounds)


def drawn_before(drawing: Drawing, run: RunConfig, prompts: StoredStream, stages: Stages) -> StoredStream:
    """What the policy before the first step draws, once and for all."""
    method, prepared = run.trained_method, preparation(run)
    shape = shape_of(method)
    store = drawn_once(drawing, run, prompts, shape, stages)
    refuse_unlabelled([store], drawing.labelling, shape, alone=method.learns_alone)
    fresh = main_stream_over([store], run, stages, weights=[1.0], groups_per_step=run.optim.groups_per_step)
    if prepared is None:
        return fresh
    columns = (*fresh.columns[0], stages.prepared(store, fresh.columns[0], prepared))
    return replace(fresh, columns=(columns,))


def drawn_rounds(
    drawing: Drawing, run: RunConfig, prompts: StoredStream, plan: RoundPlan, stages: Stages, folder: Place
) -> DrawnRounds:
    """Rounds that will be drawn into ``folder`` while the run trains."""
    method, prepared = run.trained_method, preparation(run)
    shape = shape_of(method)
    chunks = drawn_spec(drawing, run, prompts, shape, stages, needs_reference=run.needs_reference)
    stream = RoundStream(
        name=MAIN_STREAM,
        prompts=prompts,
        plan=plan,
        folder=folder,
        num_candidates=kept_candidates(shape, chunks),
        prepared=prepared.key if prepared and method.critic is None else None,
        preparation=prepared if method.critic is not None else None,
    )
    return DrawnRounds(drawing=drawing, chunks=chunks, stream=stream)


def stored_stream(
    run: RunConfig, sources: Sequence[DataSource], stages: Stages, *, groups_per_step: int
) -> StoredStream:
    """Stored groups with their columns: labels of the data or, with ``label.relabel``, of the run's own scorer."""
    method = run.trained_method
    shape = shape_of(method)
    labelling = run.relabelling
    if labelling is not None:
        prompts = [prompt_store(source, run, stages, draws=False) for source in sources]
        stores = [relabelled(labelling, run, store, shape, stages) for store in prompts]
        refuse_unlabelled(stores, labelling, shape, alone=method.learns_alone)
    else:
        stores = [stages.tokens(source, run, shape) for source in sources]
        if "mismatched" in method.needs:
            stores = [stages.mismatched(store) for store in stores]
    # Where the rule makes the labels, a prompt that it has no preference for is left out.
    made = {"label"} if run.relabels else set()
    for source, store in zip(sources, stores, strict=True):
        require_columns(run, source.label, TokenStore.open(store), among=COLUMN_FIELDS.keys() - made)
    return main_stream_over(
        stores, run, stages, weights=[source.weight for source in sources], groups_per_step=groups_per_step
    )


def keep_filtered(stream: StoredStream, run: RunConfig, stages: Stages) -> StoredStream:
    """The stream with those rows only that ``filter`` keeps.

    All stores are held to one threshold, each row counted once whatever its source's weight. Where the reference is the
    initial policy and scores at temperature 1, its log-probs are the ones that rows are chosen by. A mismatched
    completion (KTO) is company for the KL estimate and no part of its row's score.
    """
    if run.filter is None:
        return stream
    directory = filter_stage(run.filter, stream.stores, run, stages)
    stages.artifacts.note(f"filter: {filter_sentence(**filter_facts(directory))}")
    return replace(stream, kept=tuple(rows_file(directory, number) for number in range(len(stream.stores))))


def filter_stage(config: FilterConfig, stores: Sequence[Place], run: RunConfig, stages: Stages) -> Place:
    """Which rows of ``stores`` the run's filter keeps."""
    method = run.trained_method
    spec = replace(scoring_spec(run, stages.session), model=model_spec(run), logit_temperature=1.0)
    return stages.filtered(
        stores,
        [stages.log_probs(store, spec) for store in stores],
        quantile=config.policy_logp_quantile,
        own_candidates=1 if "mismatched" in method.needs else None,
        unit="groups" if run.relabels else UNITS[shape_of(method)],
    )


def main_stream_over(
    stores: Sequence[Place],
    run: RunConfig,
    stages: Stages,
    *,
    weights: Sequence[float],
    groups_per_step: int,
) -> StoredStream:
    """The main stream over ``stores``, with reference log-probs where the method needs them."""
    for store in stores:
        refuse_unreadable(store, run)
    columns: list[tuple[Place, ...]] = [()] * len(stores)
    if run.needs_reference:
        columns = [(stages.reference(store, run),) for store in stores]
    return StoredStream(
        name=MAIN_STREAM,
        stores=tuple(stores),
        columns=tuple(columns),
        weights=tuple(weights),
        groups_per_step=groups_per_step,
        num_candidates=most_candidates(stores),
        window=run.data.window,
    )


def most_candidates(stores: Sequence[Place]) -> int:
    return max(TokenStore.open(store).index.most_candidates for store in stores)


def require_columns(run: RunConfig, source: str, store: TokenStore, *, among: Iterable[str] = COLUMN_FIELDS) -> None:
    """Raises UserError where rows lack a number that the method requires; a NaN loss would say it later."""
    method = run.trained_method
    for name in sorted({*among} & needed_columns(method, run.method.config)):
        count, first = (len(store), 0) if name not in store.column_names else lacking(name, store)
        if count:
            raise UserError(
                f"{source}: {method.name} needs {COLUMN_FIELDS[name]}. {count} of {len(store)} rows lack it, "
                f"first {store.index.name(first)}"
            )


def lacking(name: str, store: TokenStore) -> tuple[int, int]:
    """In how many groups a candidate lacks the column ``name``, and the first of them.

    A mismatched completion has no label and needs none.
    """
    count, first = 0, len(store)
    for piece, values in store.column(name):
        without = np.isnan(values) & ((piece.place == 0) | (name != "label"))
        missing = np.bincount(piece.owner[without], minlength=len(piece)) > 0
        count += int(missing.sum())
        if missing.any():
            first = min(first, piece.first + int(missing.argmax()))
    return count, first


def auxiliary_streams(run: RunConfig, stages: Stages) -> list[StoredStream]:
    """One stream of single completions per entry of ``auxiliary``."""
    streams = []
    for auxiliary in run.auxiliary or ():
        sources = [with_format(source, auxiliary.term) for source in auxiliary.data]
        stream = StoredStream(
            name=auxiliary.name,
            stores=tuple(stages.tokens(source, run, "one") for source in sources),
            columns=((),) * len(auxiliary.data),
            weights=tuple(source.weight for source in auxiliary.data),
            groups_per_step=auxiliary.groups_per_step,
            num_candidates=1,
            window=run.data.window,
        )
        streams.append(stream)
    for store in chain.from_iterable(stream.stores for stream in streams):
        refuse_unreadable(store, run)
    return streams


def held_out(run: RunConfig, source: SourceSpec, stages: Stages) -> SourceSpec:
    """``data.eval`` as one step that holds every group once."""
    stream = stored_stream(run, run.data.eval, stages, groups_per_step=1)
    total = sum(len(TokenStore.open(store)) for store in stream.stores)
    return SourceSpec(
        streams=(replace(stream, groups_per_step=total),),
        seed=run.seed,
        tokens_per_micro_batch=source.tokens_per_micro_batch,
        row_tokens=source.row_tokens,
    )


def steps_of_stream(run: RunConfig, stream: StoredStream) -> int:
    """``optim.steps``, or as many as ``optim.epochs`` takes; every pass over a round counts."""
    if run.optim.steps is not None:
        return run.optim.steps
    passes = run.drawing.policy.passes if run.drawing is not None else 1
    return opened_order(stream, run.seed).num_steps(run.optim.epochs or 1.0) * passes
