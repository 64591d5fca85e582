"""What a configuration may say about WPO's weights. Without torch, so that a YAML file is read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class WPOWeight(BaseModel):
    """How a pair's weight is made from the policy's own token probabilities."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    alignment: Literal["none", "greedy", "sampled"] = "sampled"
    """What a token's probability is divided by: nothing, max_v π(v), or Σ_v π(v)²."""
    clamp: Literal["product", "each", "none"] = "product"
    """What is cut at 1: the pair's weight (KTO's examples have none), each candidate's weight, or nothing."""
    which: Literal["both", "chosen", "rejected"] = "both"
    """Whose weight counts."""


class WPOWeighting(WPOWeight):
    """The ``weighting:`` section: WPO's weight on top of another method."""

    permute: bool = False
    """Shuffle the weights over the step's batch: the control that tells alignment from a smaller step."""
