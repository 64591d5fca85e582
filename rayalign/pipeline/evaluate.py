"""``rayalign evaluate``, and the evaluation that a comparison shares: what is measured, and each policy's numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from rayalign import __version__
from rayalign.config.load import load_run
from rayalign.config.run import RunConfig
from rayalign.config.scoring import EvaluateConfig
from rayalign.engine.checkpoint import NAME, is_committed, step_of
from rayalign.errors import UserError
from rayalign.judge.measure import Measured, ScorerSpec, Table, make_scorers
from rayalign.manifest import MANIFEST, file_digest, write_durably
from rayalign.pipeline.artifacts import Artifacts, digest_of
from rayalign.pipeline.display import Board
from rayalign.pipeline.model import scorer_identity, scorer_spec, scoring_spec, spec_digest, stop_ids
from rayalign.pipeline.prompts import prompt_sets
from rayalign.pipeline.stages import Stages
from rayalign.pipeline.train import import_folder, refuse_unsupported
from rayalign.report.formatting import SHARE, interval, number
from rayalign.report.points import EvaluationPoint, Reply, Samples, as_array
from rayalign.report.statistics import Bootstrap, Estimate, estimate, prompt_means
from rayalign.rollout.base import SamplingParams
from rayalign.runtime.evaluation import EvaluationSpec, Evaluator
from rayalign.runtime.placement import Share, share
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import connect

SHOWN_PROMPTS = 6
"""Prompts of each set whose replies the report shows."""

Points = tuple[EvaluationPoint, ...]
"""One per prompt set."""


def evaluate(path: Path | None, overrides: list[str], *, console: Console) -> None:
    """Measure the checkpoints of a finished run against its reference and print the table."""
    folder = import_folder(path)
    sys.path.insert(0, str(folder))
    run = load_run(path, overrides)
    refuse_unsupported(run)
    if run.method.record.trains != "policy":
        raise UserError(
            f"{run.method.name} trains no policy that could be sampled; measure its model on held-out pairs: "
            f"rayalign evaluate {run.storage_path}/{run.name}/final --pairs test.jsonl"
        )
    if run.evaluate is None:
        raise UserError("evaluate: the configuration has no evaluate block; say which prompts and scorers")
    refuse_broken_scorers(run.evaluate)
    with connect(import_paths=[folder]) as session, Board(console) as board:
        directory = session.storage(run.storage_path) / run.name
        found = evaluated_checkpoints(directory)
        if not found:
            raise UserError(f"{directory} holds no checkpoint; train the run first: rayalign train {path or ''}")
        stages = Stages(artifacts=Artifacts(root=directory.parent / "artifacts", note=board.say), session=session)
        with closing(Evaluation.start(run, stages, share=share(session, 1), actors=1)) as evaluation:
            rows = {0: evaluation.points(None, directory)}
            for step, checkpoint in sorted(found.items()):
                board.say(f"{run.name}: measuring step {step}")
                rows[step] = evaluation.points(checkpoint, directory)
    console.print(points_table(run.evaluate, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation shared by many policies: same prompts, seeds, scorers and reference."""

    spec: EvaluationSpec
    config: EvaluateConfig
    digest: str
    evaluators: Pool

    @classmethod
    def start(cls, run: RunConfig, stages: Stages, *, share: Share, actors: int) -> Evaluation:
        """``actors`` processes that hold the reference."""
        assert run.evaluate is not None
        spec = evaluation_spec(run, stages)
        pool = Pool("evaluation", Evaluator, spec, share=share, most=actors)
        return cls(spec=spec, config=run.evaluate, digest=evaluation_digest(spec), evaluators=pool)

    def points(self, checkpoint: Path | None, directory: Path) -> Points:
        """The numbers of one checkpoint (None: the reference), measured once and kept below ``directory``."""
        step = step_of(checkpoint) if checkpoint else 0
        identity = digest_of([self.digest, file_digest(checkpoint / MANIFEST) if checkpoint else None])
        path = directory / "evaluation" / f"step_{step:06d}.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["identity"] == identity:
                return tuple(EvaluationPoint.model_validate(point) for point in stored["points"])
        measured = self.evaluators.call(checkpoint)
        points = tuple(self.point(name, step, found) for name, found in measured.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"identity": identity, "points": [point.model_dump(mode="json") for point in points]}
        write_durably(path, json.dumps(stored) + "\n")
        return points

    def point(self, prompt_set: str, step: int, measured: Measured) -> EvaluationPoint:
        scores = {scorer.label: samples(measured.scores[scorer.label]) for scorer in self.config.scorers}
        diagnostics = {scorer.label: samples(measured.scores[scorer.label]) for scorer in self.config.diagnostics}
        return EvaluationPoint(
            prompt_set=prompt_set,
            step=step,
            scores=scores,
            kl={"k1": samples(measured.k1)},
            length=samples(measured.length),
            finished=samples(measured.finished),
            diagnostics=diagnostics,
            replies=tuple(
                Reply(prompt=prompt, sample=0, text=replies[0])
                for prompt, replies in enumerate(measured.replies[:SHOWN_PROMPTS])
            ),
        )

    def close(self) -> None:
        self.evaluators.close()


def evaluation_spec(run: RunConfig, stages: Stages) -> EvaluationSpec:
    """What ``evaluate`` says, with its files read. Policies are scored as they are sampled: untempered."""
    assert run.evaluate is not None
    sampling = run.evaluate.sampling
    return EvaluationSpec(
        reference=replace(scoring_spec(run, stages.session), logit_temperature=1.0),
        prompt_sets=prompt_sets(run, stages),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            num_samples=sampling.samples,
            seed=run.seed,
            stop_ids=stop_ids(run),
        ),
        scorers=scorer_specs(run.evaluate),
    )


def evaluation_digest(spec: EvaluationSpec) -> str:
    """What a policy's numbers depend on beside the policy: prompts, scorers and their code, sampling, reference."""
    return digest_of(
        [
            {name: [asdict(prompt) for prompt in prompts] for name, prompts in spec.prompt_sets.items()},
            [scorer_identity(scorer) for scorer in spec.scorers],
            asdict(spec.sampling),
            spec_digest(spec.reference.model),
            spec.reference.model.dtype,
            __version__,
        ]
    )


def refuse_broken_scorers(config: EvaluateConfig) -> None:
    """Raise UserError now for a scorer that could not be called once the models are trained."""
    make_scorers(scorer_specs(config))


def scorer_specs(config: EvaluateConfig) -> tuple[ScorerSpec, ...]:
    return tuple(scorer_spec(scorer) for scorer in (*config.scorers, *config.diagnostics))


def evaluated_checkpoints(directory: Path) -> dict[int, Path]:
    """Step → committed checkpoint of a run."""
    found = sorted((directory / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime_ns)
    return {step_of(path): path for path in found if NAME.fullmatch(path.name) and is_committed(path)}


def samples(table: Table) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def points_table(config: EvaluateConfig, rows: Mapping[int, Points]) -> RichTable:
    """Means with their intervals over prompts, one line per step and prompt set."""
    table = RichTable(caption="mean [95 % interval over prompts, one training run]; KL: k1, nats per reply")
    labels = [scorer.label for scorer in (*config.scorers, *config.diagnostics)]
    for column in ("step", "prompts", *labels, "KL", "tokens", "cut at the limit"):
        table.add_column(column)
    for step, points in rows.items():
        for point in points:
            columns = {**point.scores, **point.diagnostics}
            values = [*(columns[label] for label in labels), point.kl["k1"], point.length]
            cut = number(1 - estimated(point.finished).mean, SHARE)
            table.add_row(str(step), point.prompt_set, *(with_interval(estimated(value)) for value in values), cut)
    return table


def estimated(values: Samples) -> Estimate:
    return estimate(prompt_means(as_array(values)), Bootstrap())


def with_interval(found: Estimate) -> str:
    return f"{number(found.mean)} {interval(found)}"
