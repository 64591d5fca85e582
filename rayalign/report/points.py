"""What a comparison measured: the raw points that every table, figure and claim of the report is computed from.

A comparison builds a :class:`ComparisonRecord` and calls :func:`save_comparison`.
:func:`rayalign.report.render.render_report` turns it into the report, now or later from :func:`load_comparison`. Names
of scorers, KL estimators and diagnostics are data.

The unit of replication is the training seed: cells that name the same ``entry`` differ in nothing else. A point holds
P prompts x S samples of every quantity as P rows of S numbers, in the order of the prompt set's ``prompts``. ``None``
(or NaN) is a missing value, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from rayalign.errors import UserError
from rayalign.report.trials import Cost, Record, TuningRecord, UntriedSetting
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import Place

FILE_NAME = "comparison.json"
REFERENCE = "reference"
BASELINE = "(baseline)"
"""What the reference, and a baseline beside it, are called where a cell's id would stand."""


def _matrix(rows: tuple[tuple[float | None, ...], ...]) -> tuple[tuple[float | None, ...], ...]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("every prompt needs the same number of samples; a missing one is null")
    return tuple(tuple(map(_finite, row)) for row in rows)


def _finite(value: float | None) -> float | None:
    """NaN as None."""
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        raise ValueError("an infinite value has no mean; a missing one is null")
    return value


Samples = Annotated[tuple[tuple[float | None, ...], ...], Field(min_length=1), AfterValidator(_matrix)]
"""P rows (prompts) of S numbers (samples)."""


def as_array(samples: Samples) -> NDArray[np.float64]:
    """``samples`` as float64 [P, S]; missing values are NaN."""
    return np.array(samples, dtype=np.float64)


class Measure(Record):
    """A measured quantity, as the report explains it."""

    name: str
    """The key under which points carry it: ``oracle``, ``k1``, ``no_valid_opening``."""
    label: str
    """Column head, such as ``oracle`` or ``no valid opening``."""
    unit: str = ""
    """``nats per reply``, ``tokens`` …; a ``share`` is 0 or 1 per reply and shown in per cent."""
    description: str = ""
    """One sentence: what it is, how it is computed, whether methods were trained on it."""


class PromptSet(Record):
    """Prompts that are evaluated, averaged and resampled together."""

    name: str
    description: str = ""
    prompts: tuple[str, ...] = Field(min_length=1)


class Reply(Record):
    """The text of one sample; its numbers are in the point at ``[prompt][sample]``."""

    prompt: int = Field(ge=0)
    sample: int = Field(ge=0)
    text: str


class AnswerCounts(Record):
    """What a scorer or judge that is asked (a model, mostly) said of one point's replies, counted."""

    role: Literal["scorer", "diagnostic", "judge"]
    name: str
    replies: int
    """Replies of the point, each of which it should have answered for."""
    missing: int = 0
    """Replies without an answer; they count in no mean."""
    problem: str = ""
    """Why the first of them has none."""
    calls: int = 0
    failures: int = 0
    """Calls that gave nothing that can be read; most were repeated with success."""
    ties: int = 0
    disagreements: int = 0
    """Verdicts that turned with the order in which two replies were shown, and so count as a half."""


class EvaluationPoint(Record):
    """One policy at one step on one prompt set: P prompts x S samples of every quantity.

    The same prompts in the same order, and the same sampling seeds, at every point of a prompt set.
    """

    prompt_set: str
    step: int = Field(ge=0)
    scores: Mapping[str, Samples]
    """Scorer name -> score of each reply."""
    kl: Mapping[str, Samples]
    """Estimator name -> its value for each reply, nats: log pi - log pi_ref (``k1``), or the exact KL of every token's
    distribution, summed (``kl_rb``, Rao-Blackwellised)."""
    length: Samples
    """Tokens of each reply, its end token included."""
    finished: Samples
    """1 where the reply ended by itself, 0 where it was cut at the limit."""
    diagnostics: Mapping[str, Samples] = {}
    verdicts: Samples | None = None
    """The judge's: how much better each reply is than the baseline's of the same prompt and number: 1, 1/2 or 0."""
    answers: tuple[AnswerCounts, ...] = ()
    """Counts of scorers and judges that count what they are asked, or left something unanswered."""
    replies: tuple[Reply, ...] = ()
    """The few texts that the report shows."""

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        shapes = {name: as_array(samples).shape for name, samples in self.columns()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"quantities of one point differ in shape [prompts, samples]: {shapes}")
        num_prompts, num_samples = as_array(self.length).shape
        for reply in self.replies:
            if reply.prompt >= num_prompts or reply.sample >= num_samples:
                raise ValueError(f"reply [{reply.prompt}][{reply.sample}] is outside [{num_prompts}, {num_samples}]")
        return self

    def columns(self) -> Iterable[tuple[str, Samples]]:
        """Every quantity with a name that says where it stands, such as ``scores.oracle``."""
        for kind in ("scores", "kl", "diagnostics"):
            for name, samples in getattr(self, kind).items():
                yield f"{kind}.{name}", samples
        if self.verdicts is not None:
            yield "verdicts", self.verdicts
        yield "length", self.length
        yield "finished", self.finished


class ConfigChange(Record):
    """One field in which a cell's configuration differs from the first cell's; values as YAML writes them."""

    field: str
    base: str
    value: str


class Filter(Record):
    """What a filter left of the stored data that a cell trained on."""

    policy_logp_quantile: float
    threshold: float
    """The lowest score that was kept: the initial policy's mean log-probability, nats per token."""
    kept: int
    of: int
    unit: str
    """What is counted: ``pairs``."""


class CellRecord(Record):
    """One method under one data policy with one seed: one training run."""

    id: str
    label: str
    """Unique and short: the name in figures and tables, such as ``dpo, on-policy``."""
    method: str
    display_name: str
    """The method as readers must know it, such as ``mpo (no KL)`` or ``dpo + wpo weights``."""
    data_policy: str
    seed: int
    entry: str = ""
    """The name in tables of this cell and those that differ from it in the seed only; empty where there are none."""
    status: Literal["done", "failed", "skipped", "stopped"]
    """A stopped cell was trained and measured up to some step before its last."""
    reason: str = ""
    """Why a cell failed, was skipped, or was stopped and where."""
    config_changes: tuple[ConfigChange, ...] = ()
    cost: Cost = Cost()
    filter: Filter | None = None
    points: tuple[EvaluationPoint, ...] = ()
    """In ascending step per prompt set; step 0 is the reference's and is in ``ComparisonRecord.reference``."""
    metrics: tuple[Mapping[str, float | None], ...] = ()
    """Rows of ``metrics.jsonl``, each with ``step``; keys are training metrics such as ``rewards/accuracies``."""

    @model_validator(mode="after")
    def _reason_is_given(self) -> Self:
        if self.status != "done" and not self.reason:
            raise ValueError(f"cell {self.id!r} is {self.status}: say why in `reason`")
        return self


class Sampling(Record):
    """How the evaluated replies were drawn, the same for every point."""

    seed: int
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


class ReportText(Record):
    """The comparison's own words: the section ``report:`` of its YAML."""

    title: str
    opening: tuple[str, ...] = ()
    """Sentences that stand above everything: what this comparison can and cannot say."""
    caveats: tuple[str, ...] = ()
    """Sentences that close the report, under *Limits*."""
    kl_levels: tuple[float, ...] = (1.0, 2.0, 5.0)
    """KL, in nats, at which cells are set side by side."""
    curves: tuple[str, ...] = ("loss", "rewards/accuracies", "rewards/margins")
    """Training metrics that are drawn, where any cell has them."""


class Provenance(Record):
    """Where the numbers come from; kept apart from them, so that equal measurements give equal files."""

    commands: tuple[str, ...] = ()
    git_revision: str = ""
    versions: Mapping[str, str] = {}
    config_digests: Mapping[str, str] = {}
    seeds: Mapping[str, int] = {}
    machine: Mapping[str, str] = {}
    started: str = ""
    finished: str = ""
    """ISO 8601 times with an offset."""


class MergedPart(Record):
    """One of the comparisons that a merged one is made of."""

    name: str
    cells: tuple[str, ...]
    """Ids of its cells; the report says how each configuration differs from the first."""


class Baseline(Record):
    """Another policy than the reference that wins are counted against."""

    label: str
    points: tuple[EvaluationPoint, ...]
    """One per prompt set."""


class ComparisonRecord(Record):
    """Everything that a report says, before any statistics.

    ``scorers[0]`` and ``kl_estimators[0]`` are the ones that tables and figures lead with; ``prompt_sets[0]`` is the
    one that the summary and the frontier are about.
    """

    name: str
    text: ReportText
    scorers: tuple[Measure, ...] = Field(min_length=1)
    kl_estimators: tuple[Measure, ...] = Field(min_length=1)
    diagnostics: tuple[Measure, ...] = ()
    judge: Measure | None = None
    """Decides wins beside the scorers, where there is one."""
    prompt_sets: tuple[PromptSet, ...] = Field(min_length=1)
    sampling: Sampling
    reference: tuple[EvaluationPoint, ...]
    """The reference at step 0, once per prompt set."""
    baseline: Baseline | None = None
    """None: wins are counted against the reference."""
    cells: tuple[CellRecord, ...]
    tuning: tuple[TuningRecord, ...] = ()
    """One per configuration where there were trials; empty where nothing was tuned."""
    measured: Mapping[str, str] = {}
    """Digests of what decides the numbers beside the policies: ``reference``, ``prompts``, ``scorers`` …"""
    parts: tuple[MergedPart, ...] = ()
    """Where several comparisons were merged."""
    left_out: tuple[UntriedSetting, ...] = ()
    """Comparisons that were measured otherwise, and so are not in this one."""
    provenance: Provenance = Provenance()

    @property
    def opponent(self) -> str:
        """What wins are counted against, in a sentence."""
        return self.baseline.label if self.baseline is not None else f"the {REFERENCE}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("id", "label"):
            _require_unique(
                f"cells: {field}",
                [REFERENCE, *([BASELINE] if self.baseline else []), *(getattr(cell, field) for cell in self.cells)],
            )
        self._check_entries()
        sizes = {prompts.name: len(prompts.prompts) for prompts in self.prompt_sets}
        if [point.prompt_set for point in self.reference] != list(sizes):
            raise ValueError(f"reference: one point per prompt set, in the order {list(sizes)}")
        self._check_points("reference", self.reference, sizes)
        if self.baseline is not None:
            if [point.prompt_set for point in self.baseline.points] != list(sizes):
                raise ValueError(f"baseline: one point per prompt set, in the order {list(sizes)}")
            self._check_points("baseline", self.baseline.points, sizes)
        for cell in self.cells:
            self._check_points(f"cell {cell.id!r}", cell.points, sizes)
            for name in sizes:
                steps = [point.step for point in cell.points if point.prompt_set == name]
                if any(later <= earlier for earlier, later in zip([0, *steps], steps, strict=False)):
                    raise ValueError(f"cell {cell.id!r}, {name}: steps {steps} must ascend from above 0")
        return self

    def _check_entries(self) -> None:
        """Cells of one entry are runs of one configuration: not two of one seed, nor two methods."""
        taken = {REFERENCE, BASELINE, *(cell.id for cell in self.cells), *(cell.label for cell in self.cells)}
        for entry in sorted({cell.entry for cell in self.cells if cell.entry}):
            members = [cell for cell in self.cells if cell.entry == entry]
            _require_unique(f"entry {entry!r}: seed", [str(cell.seed) for cell in members])
            if len({(cell.display_name, cell.data_policy) for cell in members}) > 1:
                raise ValueError(f"entry {entry!r}: its cells must share display_name and data_policy")
            if len(members) > 1 and entry in taken:
                raise ValueError(f"entry {entry!r}: is the id or label of a cell as well")

    def _check_points(self, where: str, points: tuple[EvaluationPoint, ...], sizes: Mapping[str, int]) -> None:
        for point in points:
            place = f"{where}, {point.prompt_set}, step {point.step}"
            if point.prompt_set not in sizes:
                raise ValueError(f"{place}: no such prompt set; there are {list(sizes)}")
            if len(point.length) != sizes[point.prompt_set]:
                raise ValueError(f"{place}: {len(point.length)} prompts, the set has {sizes[point.prompt_set]}")
            if (point.verdicts is None) != (self.judge is None):
                raise ValueError(f"{place}: verdicts are there exactly where the comparison declares a judge")
            for kind, measures in (
                ("scores", self.scorers),
                ("kl", self.kl_estimators),
                ("diagnostics", self.diagnostics),
            ):
                expected, found = {measure.name for measure in measures}, set(getattr(point, kind))
                if expected != found:
                    raise ValueError(f"{place}: {kind} are {sorted(found)}, the comparison declares {sorted(expected)}")


def _require_unique(what: str, values: list[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{what}: {', '.join(repeated)} more than once")


def save_comparison(comparison: ComparisonRecord, directory: Place) -> Place:
    """Write ``directory/comparison.json`` in one rename and return its path."""
    path = directory / FILE_NAME
    write_text(path, comparison.model_dump_json() + "\n")
    return path


def load_comparison(directory: Place) -> ComparisonRecord:
    """Read what :func:`save_comparison` wrote.

    Raises:
        UserError: the file is missing, or is not a comparison of this version; the message names file and field.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise UserError(f"{directory} holds no {FILE_NAME}: give the directory that `rayalign compare` wrote")
    try:
        return ComparisonRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: run `rayalign compare` again") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}" for problem in error.errors()[:5]
        )
        raise UserError(f"{path}: {problems}. Run `rayalign compare` again, or repair the field.") from error


def write_text(path: Place, text: str) -> None:
    """Write a whole file or nothing."""
    write_durably(path, text)
