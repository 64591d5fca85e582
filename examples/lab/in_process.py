"""Runs of the support desk in this process: what ``rayalign train`` does, without Ray and without artifacts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from rayalign.comparison.prompts import tokenize_prompts
from rayalign.config.candidates import Drawing
from rayalign.config.data import DataSource
from rayalign.config.run import RunConfig
from rayalign.config.training import CheckpointConfig
from rayalign.data.chat import make_chat
from rayalign.data.formats import parse_row
from rayalign.data.group import Group
from rayalign.data.records import RawRow
from rayalign.data.rows import Layout
from rayalign.data.schema import Example
from rayalign.data.select import rows_file, scores_of, select_best, write_selected_rows
from rayalign.data.shard import write_column_shard, write_shard
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.data.tokenize import Tokenized, to_groups
from rayalign.data.tokenize_rows import Shape, shape_group
from rayalign.engine import critic as actor_critic
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.loop import train_policy
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.engine.objective import MAIN_STREAM
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy
from rayalign.imports import load_object
from rayalign.judge.measure import Prompt
from rayalign.placement import Share
from rayalign.remarks import Remarks
from rayalign.rounds.chunk import ChunkMaker, ChunkReport, ChunkSpec, PromptChunk
from rayalign.rounds.client import client_of
from rayalign.rounds.drawing import commit_drawn, draw_chunks
from rayalign.rounds.service import RolloutJob, serve_rounds
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import AnyStream, MixedStream, RoundStream, SourceSpec, StoredStream
from rayalign.run.job import make_critic_spec, objectives
from rayalign.run.model import model_spec, stop_ids
from rayalign.run.reference import LOG_PROBS
from rayalign.run.rollouts import kept_candidates, preparation, round_plan, sampling
from rayalign.run.rollouts import prompts_of as prompts_in
from rayalign.run.streams import shape_of
from rayalign.runtime.session import CPU_ROW_TOKENS
from rayalign.storage.manifest import commit

CPU = torch.device("cpu")


class Alone:
    """Does in this process what a pool of actors does for ``rayalign train``."""

    def __init__(self) -> None:
        self.maker = ChunkMaker()

    def call(self, item: tuple[ChunkSpec, PromptChunk], attempts: int = 1) -> ChunkReport:
        report = self.maker(item)
        assert report is not None
        return report

    def map(self, items: Iterable[tuple[ChunkSpec, PromptChunk]], rescue: object = None) -> Iterator[ChunkReport]:
        return map(self.call, items)

    def tell(self, item: Literal["rest"]) -> None:
        self.maker(item)

    def release(self) -> None:
        """There is no other process to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Trains runs below ``folder``; runs that read the same rows share their token ids and reference log-probs."""

    folder: Path
    stores: dict[tuple[str, ...], tuple[Path, tuple[Path, ...]]] = field(default_factory=dict)
    """What was asked for → the store and the columns laid over it."""
    alone: Alone = field(default_factory=lambda: Alone())

    def train(self, run: RunConfig, name: str) -> Path:
        """Train ``run`` in the folder ``name`` and return its ``final/``."""
        assert run.optim.steps is not None
        method = run.trained_method
        scored = run.needs_reference
        main, rollouts = self.main_stream(run, shape_of(method), name, scored=scored)
        streams = [main]
        streams += [
            self.stream(
                run, extra.data, name=extra.name, shape="one", groups_per_step=extra.groups_per_step, scored=False
            )
            for extra in run.auxiliary or ()
        ]
        source = SourceSpec(
            streams=tuple(streams),
            seed=run.seed,
            tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
            row_tokens=CPU_ROW_TOKENS,
        )
        spec = TrainSpec(
            directory=self.folder / name,
            model=model_spec(run),
            objectives=objectives(run),
            optim=run.optim,
            steps=run.optim.steps,
            critic=make_critic_spec(run) if method.critic is not None else None,
            seed=run.seed,
            identity={"name": name},
            checkpoint=CheckpointConfig(every=run.optim.steps, keep=1),
            checkpoint_at=run.evaluate.at if run.evaluate else (),
            stop_ids=stop_ids(run),
            check_initial_logratio=scored,
            reference_made=None if rollouts else {},
        )

        rounds = client_of(source)

        def make_batches(layout: Layout, pad_id: int) -> StreamSource:
            return StreamSource(source, layout=layout, pad_id=pad_id, rounds=rounds)

        with serve_rounds(rollouts, self.alone, print) if rollouts else contextlib.nullcontext():
            if spec.critic is not None:
                assert rounds is not None  # a method with a critic draws rounds
                return actor_critic.train_with_critic(spec, make_batches, make_strategy("single", CPU), rounds=rounds)
            return train_policy(spec, make_batches, make_strategy("single", CPU), rounds=rounds)

    def main_stream(
        self, run: RunConfig, shape: Shape, name: str, *, scored: bool
    ) -> tuple[AnyStream, RolloutJob | None]:
        """The stream of the method, and how its rounds are drawn where it has any."""
        policy, drawing, size = run.data_policy, run.drawing, run.optim.groups_per_step
        stored = self.stream(run, run.data.train, name=MAIN_STREAM, shape=shape, groups_per_step=size, scored=scored)
        if run.filter is not None:
            stored = self.filtered(stored, run.filter.policy_logp_quantile, name)
        if drawing is None:
            return stored, None
        chunks = self.chunk_spec(drawing, run, shape, scored=scored)
        rollouts = None
        fresh: StoredStream | RoundStream
        every = drawing.policy.refresh_every
        if every == "never":
            fresh = replace(stored, stores=(self.drawn_once(chunks),), columns=((),))
        else:
            assert run.optim.steps is not None
            plan = round_plan(drawing, run, refresh_every=every, steps=run.optim.steps)
            folder = self.folder / name / "rounds"
            method, prepared = run.trained_method, preparation(run)
            with_critic = method.critic is not None
            fresh = RoundStream(
                name=MAIN_STREAM,
                prompts=chunks.prompts,
                plan=plan,
                folder=folder,
                num_candidates=kept_candidates(shape, chunks),
                prepared=prepared.key if prepared and not with_critic else None,
                preparation=prepared if with_critic else None,
            )
            rollouts = RolloutJob(
                spec=chunks,
                plan=plan,
                folder=folder,
                most=1,
                least=1,
                share=Share(cpus=1, gpus=0, threads=1),
                drawing=drawing,
                max_bad_fraction=0.0,
                preparation=None if with_critic else prepared,
            )
        if policy.fresh_fraction == 1:
            return fresh, rollouts
        fraction = policy.fresh_fraction
        mixed = MixedStream(name=MAIN_STREAM, fresh=fresh, stored=stored, fresh_fraction=fraction, groups_per_step=size)
        return mixed, rollouts

    def chunk_spec(self, drawing: Drawing, run: RunConfig, shape: Shape, *, scored: bool) -> ChunkSpec:
        """How the run's own samples become groups, as :func:`rayalign.run.rollouts.drawn_spec` says it."""
        prompts = self.prompt_store(run)
        return ChunkSpec(
            prompts=prompts_in([prompts], weights=[1.0], groups_per_step=run.optim.groups_per_step),
            seed=run.seed,
            policy=model_spec(run),
            reference=scoring_spec(run),
            engine="hf",
            sampling=sampling(drawing.rollout, run),
            keep_stored=drawing.policy.keeps_stored,
            labelling=drawing.labelling,
            shape=shape,
            needs_reference=scored,
        )

    def prompt_store(self, run: RunConfig) -> Path:
        [source] = run.data.train
        asked = (source.model_dump_json(), "prompt", "")
        if asked not in self.stores:
            directory = self.folder / f"store_{len(self.stores)}"
            prompts = [example.prompt for example in examples_of(source)]
            shard = write_shard(directory, "groups", groups_of(run, source, "prompt"), prompts=prompts)
            commit_store(directory, [shard], meta={})
            self.stores[asked] = (directory, ())
        return self.stores[asked][0]

    def drawn_once(self, chunks: ChunkSpec) -> Path:
        asked = (repr(chunks), "once", "")
        if asked not in self.stores:
            directory = self.folder / f"store_{len(self.stores)}"
            positions = range(len(TokenStore.open(chunks.prompts.stores[0])))
            reports = draw_chunks(
                chunks,
                positions,
                directory,
                weights=None,
                pool=self.alone,
                max_bad_fraction=0.0,
                told=Remarks(),
                done=print,
            )
            commit_drawn(directory, reports, max_bad_fraction=0.0)
            self.stores[asked] = (directory, ())
        return self.stores[asked][0]

    def stream(
        self,
        run: RunConfig,
        sources: Sequence[DataSource],
        *,
        name: str,
        shape: Shape,
        groups_per_step: int,
        scored: bool,
    ) -> StoredStream:
        """A stream over the rows of the only source, with reference log-probs if ``scored``."""
        [source] = sources
        asked = (source.model_dump_json(), shape, model_spec(run).name if scored else "")
        if asked not in self.stores:
            self.stores[asked] = self._store(run, source, shape, scored=scored)
        store, columns = self.stores[asked]
        return StoredStream(
            name=name,
            stores=(store,),
            columns=(columns,),
            weights=(source.weight,),
            groups_per_step=groups_per_step,
            num_candidates=2 if shape == "pair" else 1,
        )

    def filtered(self, stream: StoredStream, quantile: float, name: str) -> StoredStream:
        """The likeliest pairs of a stream whose reference is the initial policy, at temperature 1."""
        [store], [[columns]] = stream.stores, stream.columns
        laid = TokenStore.open(store).with_columns(columns)
        selection = select_best([scores_of(laid, column=LOG_PROBS, own_candidates=None)], quantile)
        directory = self.folder / f"{name}.filter"
        write_selected_rows(directory, selection)
        commit(directory, {"threshold": selection.threshold})
        return replace(stream, kept=(rows_file(directory, 0),))

    def _store(
        self, run: RunConfig, source: DataSource, shape: Shape, *, scored: bool
    ) -> tuple[Path, tuple[Path, ...]]:
        groups = groups_of(run, source, shape)
        directory = self.folder / f"store_{len(self.stores)}"
        store = commit_store(directory, [write_shard(directory, "groups", groups)], meta={})
        if not scored:
            return directory, ()
        columns = directory.with_suffix(".reference")
        logps = FrozenModel(scoring_spec(run), CPU).token_logps(groups)
        shard = write_column_shard(columns, "groups", first=0, per_token={LOG_PROBS: logps})
        commit_columns(columns, store, [shard], meta={})
        return directory, (columns,)


def scoring_spec(run: RunConfig, model: ModelSpec | None = None) -> ScoringSpec:
    """How ``model`` (the run's initial policy by default) scores: as training does."""
    return ScoringSpec(
        model=model or model_spec(run),
        tokens_per_micro_batch=run.optim.tokens_per_micro_batch,
        row_tokens=CPU_ROW_TOKENS,
        logit_temperature=run.method.config.logit_temperature,
    )


def groups_of(run: RunConfig, source: DataSource, shape: Shape) -> list[Group]:
    """The rows of a maker as token ids."""
    chat = make_chat(load_tokenizer(Path(run.model.name)), template=run.data.template, stop=run.data.end)
    outcomes = to_groups(examples_of(source), chat, run.data)
    if bad := [outcome for outcome in outcomes if not isinstance(outcome, Tokenized)]:
        raise ValueError(f"the world made a row that cannot be used: {bad[0]}")
    return [
        group for outcome in outcomes if isinstance(outcome, Tokenized) for group in shape_group(outcome.group, shape)
    ]


def prompts_of(run: RunConfig, source: DataSource) -> tuple[Prompt, ...]:
    """The prompts of a maker, as the model and as scorers read them."""
    return tokenize_prompts([replace(example, candidates=(), columns={}) for example in examples_of(source)], run)


def examples_of(source: DataSource) -> list[Example]:
    assert source.function is not None
    rows = load_object(source.function)(**source.arguments)
    parsed = [parse_row(RawRow(source=source.label, line=line, value=row)) for line, row in enumerate(rows, start=1)]
    return [row for row in parsed if isinstance(row, Example)]
