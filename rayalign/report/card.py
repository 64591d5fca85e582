"""A model card: Markdown with Hugging Face's front matter, from facts that others have read."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import ModelCardData

from rayalign.report.statistics import INTERVAL_HEAD, Estimate
from rayalign.report.templates import environment

MARK = "written by rayalign export model_card"
"""Every card that may be written again has this line."""


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
    method: str
    paper: str
    data_policy: str
    version: str
    metadata: ModelCardData
    """What the Hub reads, above the text."""
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
    return (
        environment()
        .get_template("model_card.md.jinja")
        .render(card=card, mark=MARK, interval_head=INTERVAL_HEAD, front_matter=card.metadata.to_yaml() + "\n")
    )
