"""What a comparison may cost: prices for its plan, and limits at which it stops."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from rayalign.config.fields import Block


class PricesConfig(Block):
    """What time costs, for the estimates of ``--dry-run --pilot``."""

    device_hour: Annotated[float, Field(ge=0)]
    """Price of an hour of one device: a GPU, or a CPU core where there is none."""
    currency: str | None = None
    """As tables write it."""

    @property
    def label(self) -> str:
        return self.currency or "price"


class BudgetConfig(Block):
    """What training may use in all, ``initial`` and the trials of ``tune`` included; the first limit reached counts.

    Cells that it stops are measured as they are; where ``initial`` or a trial uses it up, there is no report."""

    device_hours: Annotated[float | None, Field(gt=0)] = None
    """Hours of steps, times devices: GPUs, or CPU cores where there is none."""
    seconds: Annotated[float | None, Field(gt=0)] = None
    """Seconds of steps, those of cells that train at the same time added up."""
    tokens_trained: Annotated[int | None, Field(gt=0)] = None
    """Tokens that steps trained on."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.device_hours is None and self.seconds is None and self.tokens_trained is None:
            raise ValueError("a budget names device_hours, seconds or tokens_trained")
        return self
