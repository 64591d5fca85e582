"""``rayalign export model_card``: what a run's folder knows about the model that it ended in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCardData

from rayalign.comparison.evaluate import Points, evaluated_points
from rayalign.comparison.evaluation_spec import MEASURED_KL
from rayalign.config.dump import redact
from rayalign.config.load import importable
from rayalign.config.method import resolve_method
from rayalign.engine.checkpoint.checkpoint import NAME, step_of
from rayalign.errors import UserError
from rayalign.report.card import MARK, Card, Figure, card_text
from rayalign.report.columns import RATES, columns
from rayalign.report.formatting import SHARE
from rayalign.report.points import REFERENCE, EvaluationPoint
from rayalign.report.statistics import Bootstrap, estimate_mean, rate_estimate
from rayalign.storage.manifest import write_durably
from rayalign.storage.place import Place, place_of
from rayalign.verbs.export import write_output

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MOST_STAGES = 8
TEXT_ONLY = "Of a model for texts and images it is the part for texts alone."


def model_card(directory: Place, out: Path | None) -> Place:
    """Write the card of the model in ``directory`` (a run, its ``final/``, or a checkpoint of it); returns its path.

    Raises:
        UserError: the folder is no trained model of rayalign's, or another README.md is in the way.
    """
    run, model = run_and_model(directory)
    step = step_at(run, model)
    path: Place = out or model / "README.md"
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, such as {path / 'README.md'}")
    if path.exists() and MARK not in path.read_bytes().decode("utf-8", errors="replace"):
        raise UserError(f"{path} was not written by rayalign, and stays as it is; say --out another file, or remove it")
    text = card_text(card_of(run, step))
    if isinstance(path, Path):
        write_output(path, text)
    else:
        write_durably(path, text)
    return path


def run_and_model(directory: Place) -> tuple[Place, Place]:
    """(the run's folder, the model's)."""
    where = directory.resolve() if isinstance(directory, Path) else directory
    for run in (where, where.parent, where.parent.parent):
        if (run / "run.json").is_file():
            model = where / "final" if run == where else where
            if not (model / "config.json").is_file():
                raise UserError(f"{model} holds no model: name a run that has ended, or one of its checkpoints")
            return run, model
    raise UserError(f"{directory} belongs to no run: name a folder that rayalign train wrote, or its final/")


def step_at(run: Place, model: Place) -> int | None:
    """After which step a run's model was written; None where its folder's name does not tell."""
    if model.name == "final":
        return int(json.loads((run / "run.json").read_text(encoding="utf-8"))["steps"])
    return step_of(model) if NAME.fullmatch(model.name) else None


def card_of(run: Place, step: int | None) -> Card:
    """Card of the model after ``step``: figures are its own, or none."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    configuration = redact(facts["configuration"])
    name, paper, trains = method_facts(configuration)
    base, hub_base = base_of(configuration["model"]["name"])
    if configuration["model"].get("from_scratch"):
        base, hub_base = f"{base}, with new weights", None
    found = evaluated_points(run)
    measured = points_at(found, step)
    sources = configuration["data"]["train"]
    figures = tuple(figures_of(*measured)) if measured else ()
    point = measured[0] if measured else None
    policy = configuration.get("data_policy", {}).get("name", "off_policy")
    pipeline_tag = "text-generation" if trains == "policy" else "text-classification"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        base_model=hub_base,
        tags=["rayalign", name, policy.replace("_", "-"), "alignment"],
        datasets=list(dict.fromkeys(source["path"] for source in sources if is_hub(source.get("path")))) or None,
        model_name=facts["name"],
        eval_results=eval_results(figures, pipeline_tag, point.prompt_set if point else "") or None,
    )
    return Card(
        name=facts["name"],
        base=base,
        method=name,
        paper=paper,
        data_policy=policy,
        version=facts["versions"]["rayalign"],
        metadata=metadata,
        data=tuple(data_lines(sources, facts.get("data", []))),
        figures=figures,
        step=step or 0,
        other_steps=() if measured else tuple(step for step in found if step > 0),
        prompt_set=point.prompt_set if point else "",
        num_prompts=len(point.length) if point else 0,
        num_samples=len(point.length[0]) if point else 0,
        temperature=configuration.get("evaluate", {}).get("sampling", {}).get("temperature", 1.0),
        limits=(
            *model_limits(configuration, figures),
            *([TEXT_ONLY] if facts.get("export", {}).get("text_only") else []),
        ),
        facts=(
            ("seed", str(facts["seed"])),
            ("steps", str(facts["steps"])),
            ("workers", str(facts.get("workers", 1))),
            *export_lines(facts.get("export", {})),
            *((f"{library}", version) for library, version in facts["versions"].items()),
            ("git revision", facts.get("git_revision") or "not recorded"),
            ("ended", f"{facts['status']}, {facts['updated']}"),
        ),
        configuration=yaml.safe_dump(without_folders(configuration), sort_keys=False, allow_unicode=True).rstrip(),
    )


def eval_results(figures: Sequence[Figure], task: str, prompt_set: str) -> list[EvalResult]:
    """The figures as the Hub reads them, to six digits; what is missing is left out."""
    return [
        EvalResult(
            task_type=task,
            dataset_type="prompts",
            dataset_name=prompt_set,
            metric_type=figure.kind,
            metric_name=figure.label,
            metric_value=float(f"{figure.value.mean:.6g}"),
        )
        for figure in figures
        if not np.isnan(figure.value.mean)
    ]


def method_facts(configuration: Mapping[str, Any]) -> tuple[str, str, str]:
    """(name, paper, what is trained); of a method whose module is not here, what its name says."""
    name = configuration["method"]["name"]
    try:
        with importable(Path.cwd()):
            record = resolve_method(name)
    except UserError:
        return name.rpartition(":")[2], "", "policy"
    return record.name, record.paper, record.trains


def base_of(name: str, stages: int = MOST_STAGES) -> tuple[str, str | None]:
    """What a model started from in words and, through the runs between, as the Hub calls it."""
    if is_hub(name):
        return name, name
    place = place_of(name, field="model.name")
    for folder in (place.parent, place.parent.parent):
        if stages and (folder / "run.json").is_file():
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            model = facts["configuration"]["model"]
            words, hub = base_of(model["name"], stages - 1)
            words = f"{words}, with new weights" if model.get("from_scratch") else words
            hub = None if model.get("from_scratch") else hub
            return f"{words}, trained with {facts['configuration']['method']['name']}", hub
    return f"the model {Path(name).name}", None


def is_hub(name: str | None) -> bool:
    """True for a name on the Hub; a name without an owner counts where no such folder exists."""
    return name is not None and bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def data_lines(sources: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for source in sources:
        origin = source.get("path") or source.get("function") or ""
        parts = [f"{key} {value}" for key in ("config", "data_dir", "revision") if (value := source.get(key))]
        split = source.get("split") or ()
        named = [f"split {split if isinstance(split, str) else ', '.join(split)}"] if split else []
        yield ", ".join([path_tail(origin), *parts, *named])
    rows = [fact for fact in facts if "rows" in fact]
    if rows:
        yield (
            f"{sum(fact['rows'] for fact in rows):,} rows read, {sum(fact.get('bad', 0) for fact in rows):,} bad,"
            f" {sum(fact.get('dropped', 0) for fact in rows):,} dropped"
        )
    for fact in facts:
        if "filter" in fact:
            yield f"filtered: {fact['kept']:,} of {fact.get('rows', 0):,} rows kept"


def path_tail(value: str) -> str:
    """A path by its last part: the folders of the machine stay private."""
    place, colon, name = value.rpartition(":")
    if colon and place.endswith(".py"):
        return f"{Path(place).name}:{name}"
    return Path(value).name if value.startswith(("/", "~", ".")) else value


def without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return path_tail(value) if isinstance(value, str) else value


def export_lines(export: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How the model is saved, as ``run.json`` has it."""
    if "dtype" in export:
        yield "saved in", export["dtype"]
    if "end_tokens" in export:
        yield "a response ends with", ", ".join(export["end_tokens"])
    if "lora" in export:
        yield "LoRA", export["lora"].removeprefix("model.lora: ")


def points_at(found: Mapping[int, Points], step: int | None) -> tuple[EvaluationPoint, EvaluationPoint | None] | None:
    """(its first prompt set's numbers, the reference's) of ``step``; None where it was not measured."""
    if not step or step not in found:
        return None
    point = found[step][0]
    return point, next((one for one in found.get(0, ()) if one.prompt_set == point.prompt_set), None)


def figures_of(point: EvaluationPoint, reference: EvaluationPoint | None) -> Iterator[Figure]:
    bootstrap = Bootstrap()
    against = reference or point
    own, theirs = (
        columns(name, one, reference=against, baseline=against).values
        for name, one in (("", point), (REFERENCE, against))
    )
    for (kind, name), values in own.items():
        label, unit = LABELS.get(kind, ("", ""))
        needs = kind in ("win_rates", "lc_win_rates")
        if not label or (needs and reference is None) or (kind == "kl" and name not in MEASURED_KL):
            continue
        measured = rate_estimate if kind in RATES else estimate_mean
        yield Figure(
            label=label.format(name),
            kind=kind.rstrip("s") if kind != "length" else kind,
            unit=unit,
            value=measured(values, bootstrap),
            reference=measured(theirs[kind, name], bootstrap)
            if reference is not None and not np.isnan(theirs[kind, name]).all()
            else None,
        )


LABELS: Mapping[str, tuple[str, str]] = {
    "scores": ("{}", ""),
    "win_rates": ("win rate against the reference under {}", ""),
    "lc_win_rates": ("length-controlled win rate under {}", ""),
    "judged": ("win rate, judged", ""),
    "kl": ("KL(π‖π_ref), {}, nats per reply", ""),
    "length": ("length, tokens", ""),
    "cut": ("cut at the limit", SHARE),
}


def model_limits(configuration: Mapping[str, Any], figures: Sequence[Figure]) -> Iterator[str]:
    if figures:
        yield (
            "One training run with one seed: how much another seed would change these numbers is not measured, and the"
            " intervals are over prompts only."
        )
        yield "Scores are what the named scorers say. What a model was trained to score well on says little about it."
    yield "It was tested neither for safety nor for bias, nor for any use of it."
    yield "Its licence is that of its base model and its data, and is not stated here."
    if configuration.get("label"):
        yield "Completions were labelled by a scorer, not by people."
