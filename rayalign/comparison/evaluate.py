"""``rayalign evaluate``, and the evaluation that a comparison shares: what is measured, and each policy's numbers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable

from rayalign.comparison.baseline import baseline_directory
from rayalign.comparison.evaluation_spec import (
    KEPT,
    evaluation_digest,
    evaluation_options,
    evaluation_pool,
    evaluation_spec,
    instrument_digests,
)
from rayalign.config.load import load_run
from rayalign.config.run import EvaluatedRun
from rayalign.config.scoring import EvaluateConfig, RuleScorerConfig, ScorerConfig
from rayalign.engine.checkpoint.checkpoint import NAME, is_committed, step_of, written
from rayalign.errors import UserError
from rayalign.judge import judge_of
from rayalign.judge.base import Asked
from rayalign.judge.evaluator import EvaluationSpec, Part, PartToDraw, PartToMeasure, Subject, parts_of
from rayalign.judge.measure import Answered, Measured, Sampled, Table, joined_rows, make_scorers
from rayalign.placement import Share, even_share
from rayalign.remarks import Remarks
from rayalign.report.formatting import SHARE, format_number, interval
from rayalign.report.points import AnswerCounts, EvaluationPoint, Reply, Samples, as_array
from rayalign.report.statistics import Bootstrap, Estimate, estimate_mean, is_rate, prompt_means, rate_estimate
from rayalign.run.display import ProgressBoard
from rayalign.run.readers import refuse_unusable_models
from rayalign.run.stages import Stages
from rayalign.run.train import import_folder, refuse_unsupported
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import connect
from rayalign.storage.artifacts import Artifacts, digest_of
from rayalign.storage.manifest import MANIFEST, file_digest, write_durably
from rayalign.storage.place import Place, listed

SHOWN_PROMPTS = 6
"""Prompts of each set whose replies the report shows."""
TELL_SECONDS = 5.0
COUNTED = ("calls", "failures", "ties", "disagreements", "missing")

Role = Literal["scorer", "diagnostic", "judge"]
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
    evaluated = run.evaluated
    if evaluated is None:
        raise UserError("evaluate: the configuration has no evaluate block; say which prompts and scorers")
    refuse_broken_scorers(evaluated.evaluate)
    refuse_unusable_models(run, draws=True)
    with connect(import_paths=[folder]) as session, ProgressBoard(console) as board:
        directory = session.storage(run.storage_path) / run.name
        found = evaluated_checkpoints(directory)
        if not found:
            raise UserError(f"{directory} holds no checkpoint; train the run first: rayalign train {path or ''}")
        stages = Stages(artifacts=Artifacts(root=directory.parent / "artifacts", note=board.say), session=session)
        actors = max(1, int(session.num_gpus) // evaluation_options(evaluated, stages).tensor_parallel)
        share = even_share(session, actors)
        with closing(Evaluation.start(evaluated, stages, share=share, actors=actors)) as evaluation:
            baseline = evaluation.baseline(directory)
            rows = {"0": evaluation.points(None, directory)}
            if baseline is not None:
                rows["baseline"] = baseline
            for step, checkpoint in sorted(found.items()):
                board.say(f"{run.name}: measuring step {step}")
                rows[str(step)] = evaluation.points(checkpoint, directory)
    console.print(points_table(evaluated.evaluate, rows))
    for sentence in answer_remarks(rows):
        console.print(sentence, markup=False, highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation shared by many policies: same prompts, seeds, scorers and reference."""

    spec: EvaluationSpec
    config: EvaluateConfig
    digest: str
    evaluators: Pool
    note: Callable[[str], None] = lambda line: None
    told: Remarks = field(default_factory=Remarks)
    """What scorers and judge have remarked so far."""
    opponents: dict[Part, tuple[str, ...]] = field(default_factory=dict)
    """The baseline's replies, once the judge has needed them."""

    @classmethod
    def start(cls, evaluated: EvaluatedRun, stages: Stages, *, share: Share, actors: int) -> Evaluation:
        """In up to ``actors`` processes."""
        spec = evaluation_spec(evaluated, stages)
        pool = evaluation_pool("evaluation", evaluated.run, spec, share=share, actors=actors)
        digest, note = evaluation_digest(spec), stages.artifacts.note
        return cls(spec=spec, config=evaluated.evaluate, digest=digest, evaluators=pool, note=note)

    def points(self, checkpoint: Place | None, directory: Place) -> Points:
        """The numbers of one checkpoint (None: the reference), measured once and kept below ``directory``.

        Raises:
            UserError: a scorer or the judge left too much unanswered.
        """
        step = step_of(checkpoint) if checkpoint else 0
        identity = digest_of([self.digest, file_digest(checkpoint / MANIFEST) if checkpoint else None])
        return self._kept(directory / "evaluation" / f"step_{step:06d}.json", identity, checkpoint, step)

    def baseline(self, directory: Place) -> Points | None:
        """The numbers of the policy that wins are counted against, where that is not the reference."""
        if self.spec.baseline is None:
            return None
        identity = digest_of([self.digest, "baseline"])
        return self._kept(directory / "evaluation" / "baseline.json", identity, self.spec.baseline, 0)

    def _kept(self, path: Place, identity: str, subject: Subject, step: int) -> Points:
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["identity"] == identity:
                points = tuple(EvaluationPoint.model_validate(point) for point in stored["points"])
                if not too_many_missing(points, self.config.max_missing_fraction):
                    return points
        measured = self.measured(subject)
        self._tell(measured)
        points = tuple(self.point(name, step, found) for name, found in measured.items())
        missing = too_many_missing(points, self.config.max_missing_fraction)
        if missing:
            raise UserError(missing[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: dict[str, Any] = {}
        for name, found in measured.items():
            texts = [prompt.text for prompt in self.spec.prompt_sets[name]]
            kept[name] = {"prompts": texts, "replies": found.replies}
        stored = {"identity": identity, "points": [point.model_dump(mode="json") for point in points], KEPT: kept}
        write_durably(path, json.dumps(stored) + "\n")
        return points

    def measured(self, subject: Subject) -> dict[str, Measured]:
        """One policy on every prompt set: all of it is sampled, then all of it is measured, part by part."""
        parts = parts_of(self.spec)
        opponents: dict[Part, tuple[str, ...]] = {}
        if self.spec.judge is not None and subject != self.spec.baseline:
            if not self.opponents:
                baseline = self._drawn(self.spec.baseline)
                self.opponents.update({part: sampled.replies for part, sampled in baseline.items()})
            opponents = self.opponents
        drawn = self._drawn(subject)
        items = [
            PartToMeasure(subject=subject, part=part, drawn=drawn[part], opponents=opponents.get(part))
            for part in parts
        ]
        found = dict(zip(parts, self._done(items, "measured"), strict=True))
        by_set: dict[str, list[Measured]] = {name: [] for name in self.spec.prompt_sets}
        for part in parts:
            by_set[part.prompt_set].append(found[part])
        return {name: joined_rows(measured) for name, measured in by_set.items()}

    def _drawn(self, subject: Subject) -> dict[Part, Sampled]:
        parts = parts_of(self.spec)
        items = [PartToDraw(subject=subject, part=part) for part in parts]
        return dict(zip(parts, self._done(items, "sampled"), strict=True))

    def _done(self, items: Sequence[PartToDraw | PartToMeasure], what: str) -> Iterator[Any]:
        """The evaluators' answers in order, with a word now and then on how many there are."""
        told = time.monotonic()
        for count, answer in enumerate(self.evaluators.map(items), start=1):
            if time.monotonic() - told > TELL_SECONDS and count < len(items):
                self.note(f"evaluation: {count}/{len(items)} parts {what}")
                told = time.monotonic()
            yield answer

    def _tell(self, measured: Mapping[str, Measured]) -> None:
        """Say what scorers and judge remarked and was not said before."""
        for found in measured.values():
            for answered in (*found.scored.values(), found.judged):
                for remark in answered.remarks if answered is not None else ():
                    self.told.add(remark)
        for remark in self.told.take():
            self.note(f"evaluation: {remark}")

    @property
    def measured_by(self) -> dict[str, str]:
        return instrument_digests(self.spec)

    def point(self, prompt_set: str, step: int, measured: Measured) -> EvaluationPoint:
        scores = {scorer.label: sample_rows(measured.scores[scorer.label]) for scorer in self.config.scorers}
        diagnostics = {scorer.label: sample_rows(measured.scores[scorer.label]) for scorer in self.config.diagnostics}
        return EvaluationPoint(
            prompt_set=prompt_set,
            step=step,
            scores=scores,
            kl={"kl_rb": sample_rows(measured.kl_rb), "k1": sample_rows(measured.k1)},
            length=sample_rows(measured.length),
            finished=sample_rows(measured.finished),
            diagnostics=diagnostics,
            verdicts=sample_rows(measured.judged.values) if measured.judged is not None else None,
            answers=tuple(self._answers(measured)),
            replies=tuple(
                Reply(prompt=prompt, sample=0, text=replies[0])
                for prompt, replies in enumerate(measured.replies[:SHOWN_PROMPTS])
            ),
        )

    def _answers(self, measured: Measured) -> Iterator[AnswerCounts]:
        """Counts of the scorers and judges that count what they are asked, or left something unanswered."""
        config = self.config
        asked: list[tuple[Role, ScorerConfig, Answered | None]] = []
        asked += [("scorer", scorer, measured.scored[scorer.label]) for scorer in config.scorers]
        asked += [("diagnostic", scorer, measured.scored[scorer.label]) for scorer in config.diagnostics]
        asked += [("judge", config.judge, measured.judged)] if config.judge is not None else []
        for role, scorer, found in asked:
            if found is not None and (found.asked is not None or found.missing):
                yield AnswerCounts(
                    role=role,
                    name=scorer.label,
                    replies=found.values.size,
                    missing=found.missing,
                    problem=found.problem,
                    **asdict(found.asked or Asked()),
                )

    def close(self) -> None:
        self.evaluators.close()


def too_many_missing(points: Points, limit: float) -> list[str]:
    """A sentence for every scorer and judge that left more than ``limit`` of a prompt set's replies unanswered."""
    sentences: list[str] = []
    for point in points:
        sentences += [
            f"evaluation of {point.prompt_set}: the {found.role} {found.name} gave no answer for {found.missing} of "
            f"{found.replies} replies, more than evaluate.max_missing_fraction {limit:g} allows; first: {found.problem}"
            for found in point.answers
            if found.missing > limit * found.replies
        ]
    return sentences


def refuse_broken_scorers(config: EvaluateConfig) -> None:
    """Raise UserError now for what could not be measured with once the models are trained: scorers, judge, baseline."""
    baseline_directory(config)
    make_scorers(config.all_scorers)
    if config.judge is not None:
        judge_of(config.judge)


def evaluated_checkpoints(directory: Place) -> dict[int, Place]:
    """Step → committed checkpoint of a run."""
    found: list[Place] = [path for path in (directory / "checkpoints").glob("step_*") if NAME.fullmatch(path.name)]
    found.sort(key=written)
    return {step_of(path): path for path in found if is_committed(path)}


def evaluated_points(directory: Place) -> dict[int, Points]:
    """Step → the numbers that were kept of a run's checkpoints; those of its reference at step 0."""
    files = listed(directory / "evaluation", "step_*.json")
    found: dict[int, Points] = {}
    for path in files:
        stored = json.loads(path.read_text(encoding="utf-8"))
        step = int(path.stem.removeprefix("step_"))
        found[step] = tuple(EvaluationPoint.model_validate(point) for point in stored["points"])
    return found


def sample_rows(table: Table) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def points_table(config: EvaluateConfig, rows: Mapping[str, Points]) -> RichTable:
    """Means with their intervals over prompts, one line per step and prompt set."""
    table = RichTable(caption="mean [95 % interval over prompts, one training run]; KL: kl_rb and k1, nats per reply")
    scorers = (*config.scorers, *config.diagnostics)
    labels = [scorer.label for scorer in scorers]
    shares = {scorer.label for scorer in scorers if isinstance(scorer, RuleScorerConfig) and scorer.unit == SHARE}
    wins = [f"win rate, judged by {config.judge.label}"] if config.judge is not None else []
    for column in ("step", "prompts", *labels, *wins, "KL, kl_rb", "KL, k1", "tokens", "cut at the limit"):
        table.add_column(column)
    for step, points in rows.items():
        for point in points:
            columns = {**point.scores, **point.diagnostics}
            found = [estimate_samples(columns[label], rate=label in shares) for label in labels]
            found += [estimate_samples(point.verdicts, rate=True)] if point.verdicts is not None else []
            found += [estimate_samples(value) for value in (point.kl["kl_rb"], point.kl["k1"], point.length)]
            cut = format_number(1 - estimate_samples(point.finished).mean, SHARE)
            table.add_row(step, point.prompt_set, *map(number_with_interval, found), cut)
    return table


def answer_remarks(rows: Mapping[str, Points]) -> Iterator[str]:
    """One sentence for everybody who was asked, at every step."""
    for step, points in rows.items():
        for point in points:
            for found in point.answers:
                counts = ", ".join(f"{getattr(found, key)} {key}" for key in COUNTED)
                yield f"step {step}, {point.prompt_set}: {found.role} {found.name}: {found.replies} replies, {counts}"


def estimate_samples(values: Samples, *, rate: bool = False) -> Estimate:
    """Mean and interval over prompts; of a ``rate``, where its values are such, inside [0, 1]."""
    table = as_array(values)
    return (rate_estimate if rate and is_rate(table) else estimate_mean)(prompt_means(table), Bootstrap())


def number_with_interval(found: Estimate) -> str:
    return f"{format_number(found.mean)} {interval(found)}"
