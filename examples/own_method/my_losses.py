"""A method of one's own: calibrated DPO, which also pulls the chosen log-ratio towards a target.

method: {name: "my_losses:METHOD", beta: 0.1, target: 2.0}
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rayalign.methods import Method, MethodConfig, Statistics, Term
from rayalign.types import Scored


class CalibratedConfig(MethodConfig):
    beta: float = 0.1
    target: float = 2.0
    """Where the chosen candidate's log(π/π_ref) should come to rest, in nats."""
    weight: float = 0.01


def loss(scored: Scored, config: CalibratedConfig, statistics: Statistics) -> tuple[Term, ...]:
    # Select before computing: a pair that is not real may hold NaN.
    log_ratio = torch.where(scored.pair_mask[:, None], scored.scores.logp - scored.candidate("ref_logp"), 0.0)
    preference = -F.logsigmoid(config.beta * (log_ratio[:, 0] - log_ratio[:, 1]))
    calibration = (log_ratio[:, 0] - config.target).square()
    return (
        Term(name="preference", per_item=preference, mask=scored.pair_mask, over="pairs"),
        Term(name="calibration", per_item=calibration, mask=scored.pair_mask, over="pairs", weight=config.weight),
    )


METHOD = Method(name="calibrated", config=CalibratedConfig, loss=loss, needs=frozenset({"ref_logp"}))
