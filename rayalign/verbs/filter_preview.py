"""What ``filter`` would keep of files that are only checked: their rows scored by a model, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from rayalign.config.training import OptimConfig
from rayalign.data.group import Group
from rayalign.data.select import likelihood, select_best
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.runtime.session import CPU_ROW_TOKENS


class RowScores:
    """The likelihood of every row so far under one model."""

    def __init__(self, model: ModelSpec) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        spec = ScoringSpec(
            model=model,
            tokens_per_micro_batch=OptimConfig().tokens_per_micro_batch,
            row_tokens=None if device.type == "cuda" else CPU_ROW_TOKENS,
        )
        self.name = model.name
        self.model = FrozenModel(spec, device)
        self.scores: list[float] = []

    def add(self, rows: Iterable[Group]) -> None:
        """Score the rows that training would read; a prompt alone has nothing to score."""
        groups = [group for group in rows if group.candidates]
        if not groups:
            return
        for group, column in zip(groups, self.model.token_logps(groups), strict=True):
            self.scores.append(likelihood(column, [candidate.num_predicted for candidate in group.candidates]))

    def facts(self, quantile: float) -> dict[str, Any] | None:
        """As a run records what its filter did, over all files together; None without a row."""
        if not self.scores:
            return None
        selection = select_best([np.array(self.scores)], quantile)
        return {
            "policy_logp_quantile": quantile,
            "threshold": selection.threshold,
            "kept": len(selection.kept[0]),
            "of": len(self.scores),
            "unit": "rows",
        }
