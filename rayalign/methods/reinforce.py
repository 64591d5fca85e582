"""REINFORCE: the score-function gradient. With a leave-one-out advantage this is RLOO.

Williams 1992; Ahmadian et al. 2024, arXiv:2402.14740.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def reinforce_loss(logp: Float[Tensor, " N"], advantage: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """−A · log π, per token or per sequence; the advantage is a constant."""
    return -advantage * logp
