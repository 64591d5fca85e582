"""What a frozen model says of given groups, through the very forward that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from rayalign import __version__
from rayalign.config.training import ParameterDtype
from rayalign.data.group import Column, Group
from rayalign.data.micro_batches import plan_step
from rayalign.data.pack import group_lengths, pack
from rayalign.data.rows import Layout
from rayalign.engine.batches import to_device
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.parity import choose_attention
from rayalign.engine.model.pretrained import CPU, ModelSpec, compute_dtype, load_policy
from rayalign.engine.strategy.base import freeze_whole
from rayalign.types import PackedBatch, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """How groups are laid out and at which temperature they are scored; equal to training's."""

    model: ModelSpec
    tokens_per_micro_batch: int
    row_tokens: int | None
    logit_temperature: float = 1.0
    parameter_dtype: ParameterDtype = "auto"
    """What the model's parameters are held in: see :func:`rayalign.engine.model.parameter_dtype.names_in_bfloat16`."""


def computed_with(model: PreTrainedModel, layout: Layout, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What log-probs depend on beside model and data."""
    return {
        "layout": layout,
        "attention": str(model.config._attn_implementation),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rayalign": __version__,
    }


def num_predicted(group: Group) -> int:
    """Predicted tokens of all candidates."""
    return sum(candidate.num_predicted for candidate in group.candidates)


class FrozenModel:
    """A frozen model that scores groups."""

    def __init__(self, spec: ScoringSpec, device: torch.device) -> None:
        model, tokenizer = load_policy(spec.model, device=device, place=CPU)
        self.spec = spec
        self.model = model
        self.device = device
        self.dtype = compute_dtype(spec.model, device)
        attention = choose_attention(model, device=device)
        self.layout = attention.layout
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.policy = freeze_whole(root_module(model, attention), spec.parameter_dtype, self.dtype, device=device)

    def facts(self) -> dict[str, str]:
        """With what it computes: what may change log-probs although model and data are the same."""
        return computed_with(self.model, self.layout, self.dtype, self.device)

    def token_logps(self, groups: Sequence[Group]) -> list[Column]:
        """For every group, float32 log-probabilities (nats) of its predicted tokens, candidate after candidate."""
        columns: list[Column] = [np.empty(0, np.float32)] * len(groups)
        for slots, scores in self._forward(groups, frozenset()):
            ends = np.cumsum([num_predicted(groups[slot]) for slot in slots])
            parts = np.split(scores.token_logp.float().cpu().numpy(), ends[:-1])
            for slot, part in zip(slots, parts, strict=True):
                columns[slot] = part
        return columns

    def scores(self, groups: Sequence[Group]) -> list[Column]:
        """For every group, float32 [K]: the scalar head at each candidate's last token."""
        columns: list[Column] = [np.empty(0, np.float32)] * len(groups)
        for slots, scores in self._forward(groups, frozenset({"score"})):
            assert scores.score is not None
            for slot, row in zip(slots, scores.score.float().cpu().numpy(), strict=True):
                columns[slot] = row[: len(groups[slot].candidates)]
        return columns

    @torch.no_grad()
    def _forward(self, groups: Sequence[Group], needs: frozenset[str]) -> Iterator[tuple[Sequence[int], Scores]]:
        """(places of the groups, what the model says of them), micro-batch after micro-batch."""
        for slots, batch in self.micro_batches(groups, self.layout):
            with self.autocast():
                scores = self.policy(batch, needs=needs, logit_temperature=self.spec.logit_temperature)
            yield slots, scores

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def micro_batches(self, groups: Sequence[Group], layout: Layout) -> Iterator[tuple[Sequence[int], PackedBatch]]:
        """(places of the groups, they packed on the device); groups without candidates are in none."""
        kept = [slot for slot, group in enumerate(groups) if group.candidates]  # the others have nothing to score
        lengths = [group_lengths(groups[slot]) for slot in kept]
        [micro_batches] = plan_step(
            lengths,
            num_workers=1,
            tokens_per_micro_batch=self.spec.tokens_per_micro_batch,
            row_tokens=self.spec.row_tokens,
            layout=layout,
            describe=lambda place: f"{groups[kept[place]].source}:{groups[kept[place]].line}",
        )
        for micro in micro_batches:
            slots = [kept[place] for place in micro.slots]
            batch = pack(
                [groups[slot] for slot in slots],
                positions=slots,
                num_candidates=max(len(groups[slot].candidates) for slot in slots),
                pad_id=self.pad_id,
                row_tokens=self.spec.row_tokens,
                layout=layout,
            )
            yield slots, to_device(batch, self.device)
