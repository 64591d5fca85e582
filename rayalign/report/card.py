"""A model card: Markdown with Hugging Face's front matter, from facts that others have read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from rayalign.report import formatting
from rayalign.report.statistics import INTERVAL_HEAD, Estimate

MARK = "written by rayalign export model_card"
"""Stands in every card that may be written again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    label: str
    kind: str
    """``type`` of the metric in the front matter, such as ``win_rate``."""
    unit: str
    value: Estimate
    reference: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    name: str
    base: str
    """What it started from, in words."""
    hub_base: str | None
    """Its name on the Hub; None: it is a folder."""
    method: str
    paper: str
    data_policy: str
    version: str
    pipeline_tag: str
    tags: tuple[str, ...]
    datasets: tuple[str, ...]
    """Names on the Hub."""
    data: tuple[str, ...]
    """A sentence per source."""
    figures: tuple[Figure, ...] = ()
    step: int = 0
    other_steps: tuple[int, ...] = ()
    """That were measured, where this one was not."""
    prompt_set: str = ""
    num_prompts: int = 0
    num_samples: int = 0
    temperature: float = 1.0
    limits: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    configuration: str = ""
    """YAML, without secrets."""


def card_text(card: Card) -> str:
    """The text of ``README.md``; whatever a card says is inert there."""
    environment = Environment(
        loader=PackageLoader("rayalign", "report"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= formatting.FILTERS
    return environment.get_template("model_card.md.jinja").render(
        card=card,
        mark=MARK,
        interval_head=INTERVAL_HEAD,
        front_matter=yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000),
    )


def front_matter(card: Card) -> Mapping[str, Any]:
    """What the Hub reads. A licence is the publisher's to choose, and a folder is no base that it knows."""
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": card.pipeline_tag}
    if card.hub_base is not None:
        facts["base_model"] = card.hub_base
    facts["tags"] = list(card.tags)
    if card.datasets:
        facts["datasets"] = list(card.datasets)
    if card.figures:
        metrics = [
            {"type": figure.kind, "name": figure.label, "value": float(f"{figure.value.mean:.6g}")}
            for figure in card.figures
            if figure.value.mean == figure.value.mean  # not missing
        ]
        result = {
            "task": {"type": card.pipeline_tag},
            "dataset": {"type": "prompts", "name": card.prompt_set},
            "metrics": metrics,
        }
        facts["model-index"] = [{"name": card.name, "results": [result]}]
    return facts
