"""How far a policy is from its reference on given groups, token by token, through the forward that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayalign.data.group import Column, Group
from rayalign.data.rows import Layout
from rayalign.engine.frozen import FrozenModel, num_predicted
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.head import token_divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Values of one group's predicted tokens, candidate after candidate; nats, float32, at temperature 1."""

    log_ratio: Column
    """log π − log π_ref of the token at that place: its sum over a reply drawn from π is k1."""
    kl: Column
    """KL(π‖π_ref) of the next-token distributions, exact over the vocabulary: its sum is the Rao–Blackwellised
    estimator. NaN where the two heads differ in vocabulary."""


@torch.no_grad()
def divergences(policy: FrozenModel, reference: FrozenModel, groups: Sequence[Group]) -> list[Divergence]:
    """One record per group. Both models read the same rows; neither's logits exist for more than a chunk of tokens.

    Raises:
        ValueError: one of them has a scalar head, so that it is no distribution.
    """
    if not isinstance(policy.policy, Policy) or not isinstance(reference.policy, Policy):
        raise ValueError("a KL is between two language models; one of these has a scalar head")
    nothing = Divergence(log_ratio=np.empty(0, np.float32), kl=np.empty(0, np.float32))
    found = [nothing] * len(groups)
    layout: Layout = "packed" if policy.layout == reference.layout == "packed" else "concatenated"
    for slots, batch in policy.micro_batches(groups, layout):
        with policy.autocast():
            own = policy.policy.head_input(batch)
            other = own if reference is policy else reference.policy.head_input(batch)
            tokens = token_divergence(own, other, batch.target_ids)
        ends = np.cumsum([num_predicted(groups[slot]) for slot in slots])
        log_ratios = np.split((tokens.logp - tokens.ref_logp).float().cpu().numpy(), ends[:-1])
        exact = np.split(tokens.kl.float().cpu().numpy(), ends[:-1])
        for slot, log_ratio, kl in zip(slots, log_ratios, exact, strict=True):
            found[slot] = Divergence(log_ratio=log_ratio, kl=kl)
    return found
