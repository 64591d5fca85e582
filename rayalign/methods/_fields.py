"""Parameter types that several methods share; each refuses impossible values and says why."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def _share_of_flipped_labels(value: float) -> float:
    if not 0 <= value < 0.5:
        raise ValueError(
            "label_smoothing is the assumed share of flipped labels and must lie in [0, 0.5): "
            "at 0.5 the labels say nothing, above it they say the opposite"
        )
    return value


LabelSmoothing = Annotated[float, AfterValidator(_share_of_flipped_labels)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
