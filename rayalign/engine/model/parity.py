"""Proof that a model family reads packed rows as it reads plain sequences, before any row is packed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.data.group import Candidate, Group
from rayalign.data.pack import pack
from rayalign.data.rows import Layout
from rayalign.engine.model.attention import attention_kind
from rayalign.engine.model.context import context_of
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.kinds import computing
from rayalign.engine.model.proofs import proven
from rayalign.engine.model.scalar import is_scalar
from rayalign.engine.model.shrunken import VOCABULARY, WINDOW, shrunken
from rayalign.errors import UserError

TOLERANCE = 1e-3
"""Nats per token, or units of score. Float32 rounding stays below 1e-5; a wrong mask is off by about 1."""

LONGEST = 5 * WINDOW
"""Tokens of a sequence that the family is tried on, at most."""

log = logging.getLogger(__name__)


def choose_layout(model: PreTrainedModel, *, device: torch.device | None = None) -> Layout:
    """The layout that ``model``'s family is proven to read right: ``packed`` where possible, else ``concatenated``.

    The proof is a float32 forward against transformers' own forward of each sequence alone, on a random model of the
    same configuration with fewer layers (one of each type), a small vocabulary and a window shorter than the sequences,
    which are as long as the model reads (:func:`rayalign.engine.model.context.context_of`). A family outside the table
    of attention families is tried as it is, on plain sequences. ``device`` is where the family will compute, if the
    model's weights wait elsewhere. The result is kept: see :mod:`rayalign.engine.model.proofs`.

    Raises:
        UserError: not even plain sequences give the log-probabilities that transformers gives, or it gives none.
    """
    differences: dict[str, float] = proven(
        "parity", model, partial(measure_layouts, model, device=device), device=device or model.device
    )
    for layout in ("packed", "concatenated"):
        if differences.get(layout, float("inf")) <= TOLERANCE:
            return layout
        if layout in differences:
            log.warning(
                "%s models read %s rows wrongly: token log-probs or scores differ by up to %.3g from plain sequences",
                model.config.model_type,
                layout,
                differences[layout],
            )
    numbers, unit = ("scores", "") if is_scalar(model) else ("log-probs", " nats")
    raise UserError(
        f"model.name: {numbers} of {model.config.model_type} models differ by {differences['concatenated']:.3g}{unit} "
        "from what transformers computes, so this family cannot be trained"
    )


def measure_layouts(model: PreTrainedModel, *, device: torch.device | None = None) -> dict[str, float]:
    """Largest |Δ log-prob| of a token, in nats, or |Δ score|, for every layout that the family may use."""
    known = attention_kind(model.config).reach is not None
    layouts: tuple[Layout, ...] = ("packed", "concatenated") if known else ("concatenated",)
    probe = shrunken(model, device) if known else model
    context = context_of(probe.config)
    groups = probe_groups(context.tokens if context is not None else LONGEST)
    with torch.no_grad():
        with computing(model.config):
            expected = (plain_score if is_scalar(probe) else plain_token_logp)(probe, groups)
        return {layout: _difference(probe, groups, layout, expected) for layout in layouts}


def plain_token_logp(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " N"]:
    """Response log-probs by the model's own forward, one sequence at a time, in the packer's order."""
    columns = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            logp = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(dim=-1)
            columns.append(logp.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0])
    return torch.cat(columns)


def plain_score(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " C"]:
    """Every candidate's score by the model's own backbone and head, one sequence at a time."""
    scores = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            scores.append(model.score(model.base_model(input_ids=ids[None]).last_hidden_state)[0, -1, 0].float())
    return torch.stack(scores)


def probe_groups(most: int) -> list[Group]:
    """Ragged groups of 1, 2 and 4 candidates, most of them longer than the window; no sequence above ``most``."""
    random = np.random.default_rng(0)

    def ids(shortest: int, longest: int) -> np.ndarray:
        return random.integers(0, VOCABULARY, random.integers(shortest, longest + 1)).astype(np.int32)

    def candidate(room: int) -> Candidate:
        tokens = ids(1, room)
        return Candidate(ids=tokens, mask=np.ones(len(tokens), dtype=np.bool_))

    groups = []
    for num_candidates in (2, 1, 4):
        prompt = ids(2, min(2 * WINDOW, most // 2))
        room = min(3 * WINDOW, most - len(prompt))
        groups.append(Group(prompt_ids=prompt, candidates=tuple(candidate(room) for _ in range(num_candidates))))
    return groups


def _difference(probe: PreTrainedModel, groups: Sequence[Group], layout: Layout, expected: Tensor) -> float:
    batch = pack(groups, positions=range(len(groups)), num_candidates=4, pad_id=0, row_tokens=8 * WINDOW, layout=layout)
    moved: dict[str, Any] = {
        name: value.to(probe.device) for name in batch.__slots__ if isinstance(value := getattr(batch, name), Tensor)
    }
    batch = replace(batch, **moved)
    scores = root_module(probe, layout=layout)(batch, needs=frozenset({"score"}))
    found = scores.score[batch.candidate_mask] if is_scalar(probe) else scores.token_logp
    return float((found - expected).abs().max())
