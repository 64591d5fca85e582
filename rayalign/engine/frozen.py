"""Log-probabilities of given groups under a frozen model, through the very forward that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayalign.data.group import Column, Group
from rayalign.data.pack import group_lengths, pack
from rayalign.data.plan import plan_step
from rayalign.data.rows import Layout
from rayalign.engine.forward import Policy
from rayalign.engine.model import ModelSpec, compute_dtype, load_policy
from rayalign.engine.parity import choose_layout
from rayalign.engine.step import to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """How groups are laid out and at which temperature they are scored; equal to training's."""

    model: ModelSpec
    tokens_per_micro_batch: int
    row_tokens: int | None
    logit_temperature: float = 1.0


class FrozenModel:
    """A frozen model that scores groups."""

    def __init__(self, spec: ScoringSpec, device: torch.device) -> None:
        model, tokenizer = load_policy(spec.model, device=device)
        self.spec = spec
        self.device = device
        self.dtype = compute_dtype(spec.model, device)
        self.layout: Layout = choose_layout(model)
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.policy = Policy(model, layout=self.layout).requires_grad_(False)

    @torch.no_grad()
    def token_logps(self, groups: Sequence[Group]) -> list[Column]:
        """For every group, float32 log-probabilities (nats) of its predicted tokens, candidate after candidate."""
        columns: list[Column] = [np.empty(0, np.float32)] * len(groups)
        scored = [slot for slot, group in enumerate(groups) if group.candidates]
        for slot, column in zip(scored, self._scored([groups[slot] for slot in scored]), strict=True):
            columns[slot] = column
        return columns

    def _scored(self, groups: Sequence[Group]) -> list[Column]:
        lengths = [group_lengths(group) for group in groups]
        [micro_batches] = plan_step(
            lengths,
            num_workers=1,
            tokens_per_micro_batch=self.spec.tokens_per_micro_batch,
            row_tokens=self.spec.row_tokens,
            layout=self.layout,
            describe=lambda slot: f"{groups[slot].source}:{groups[slot].line}",
        )
        columns: list[Column] = [np.empty(0, np.float32)] * len(groups)
        for micro in micro_batches:
            batch = pack(
                [groups[slot] for slot in micro.slots],
                positions=micro.slots,
                num_candidates=max(len(groups[slot].candidates) for slot in micro.slots),
                pad_id=self.pad_id,
                row_tokens=self.spec.row_tokens,
                layout=self.layout,
            )
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                scores = self.policy(to_device(batch, self.device), logit_temperature=self.spec.logit_temperature)
            ends = np.cumsum([sum(lengths[slot].predicted) for slot in micro.slots])
            parts = np.split(scores.token_logp.float().cpu().numpy(), ends[:-1])
            for slot, part in zip(micro.slots, parts, strict=True):
                columns[slot] = part
        return columns
