"""Engines by name."""

from __future__ import annotations

from rayalign.engine.frozen import FrozenModel
from rayalign.rollout.base import RolloutEngine, SamplingParams
from rayalign.rollout.hf import HfEngine


def make_engine(
    name: str, policy: FrozenModel, *, previous: RolloutEngine | None, sampling: SamplingParams
) -> RolloutEngine:
    """The engine called ``name`` holding ``policy``'s weights; ``previous`` is handed on where it can be refreshed."""
    return HfEngine(policy.policy.model)
