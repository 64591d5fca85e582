"""What a run used, and the trials before a comparison, as records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(Record):
    """What a cell used from its first step to its last; evaluation is not counted."""

    tokens_trained: int = 0
    tokens_generated: int = 0
    labels_used: int = 0
    scorer_calls: int = 0
    device_seconds: float | None = None
    """Seconds of wall time times devices (CPU cores where there is no accelerator)."""


class UntriedSetting(Record):
    """A setting, or a combination of values, that a configuration could not try."""

    what: str
    reason: str


class TrialRecord(Record):
    """One combination of settings, trained before the comparison with seeds of its own."""

    label: str
    values: Mapping[str, str]
    """Setting -> value, as YAML writes it."""
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, or could not be picked although it did not."""
    step: int | None = None
    """The last evaluated one, where it was measured."""
    score: float | None = None
    """Mean over the prompts of the select half and the tuning seeds."""
    kl: float | None = None
    """The same of the KL, nats per reply."""
    cost: Cost = Cost()
    """Total over all its runs."""


class TuningRecord(Record):
    """The trials of one configuration: of cells that differ in their seed only."""

    label: str
    cells: tuple[str, ...]
    """Ids of the cells that were trained with what was picked."""
    asked: int
    """Trials that were asked for; there may be fewer combinations."""
    seeds: tuple[int, ...]
    scorer: str
    prompt_set: str
    num_prompts: int
    """Number of prompts in the select half."""
    max_kl: float | None = None
    trials: tuple[TrialRecord, ...] = ()
    """Empty: untuned."""
    picked: int | None = None
    """Its place in ``trials``."""
    left_out: tuple[UntriedSetting, ...] = ()

    @property
    def choice(self) -> TrialRecord | None:
        return None if self.picked is None else self.trials[self.picked]

    @model_validator(mode="after")
    def _picked_is_a_trial(self) -> Self:
        if self.picked is not None and not 0 <= self.picked < len(self.trials):
            raise ValueError(f"tuning of {self.label!r}: picked {self.picked} of {len(self.trials)} trials")
        return self
