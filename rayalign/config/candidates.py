"""Where a run's candidates come from, as its blocks say together: what is drawn, and how that is scored and labelled.

The YAML has ``data_policy``, ``rollout``, ``scorer`` and ``label`` side by side, and a legal run has all that it needs.
Here they stand together, so that no code has to ask again whether one of them is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.config.data import DataSource
from rayalign.config.policy import HybridConfig, LabelConfig, OnPolicyConfig, RolloutConfig
from rayalign.config.scoring import ScorerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelling:
    """How candidates get their rewards, and rewards become preferences."""

    scorer: ScorerConfig
    label: LabelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How completions are drawn from the policy, and what becomes of them."""

    policy: OnPolicyConfig | HybridConfig
    rollout: RolloutConfig
    labelling: Labelling

    def prompts(self, train: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        """The sources whose prompts are completed: ``data_policy.prompts``, or those of ``train``."""
        own = self.policy.prompts
        return train if own is None else (own.model_copy(update={"format": own.format or "auto"}),)
