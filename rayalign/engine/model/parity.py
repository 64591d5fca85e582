"""Proof that a model family reads packed rows as it reads plain sequences, before any row is packed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rayalign.data.group import Candidate, Group
from rayalign.data.pack import pack
from rayalign.engine.batches import to_device
from rayalign.engine.model.attention import CONCATENATED_ONLY, AttentionKind, attention_kinds
from rayalign.engine.model.context import context_of
from rayalign.engine.model.folder import FAILURES
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.kinds import computing
from rayalign.engine.model.proofs import proven
from rayalign.engine.model.scalar import is_scalar
from rayalign.engine.model.shrunken import VOCABULARY, WINDOW, probe_for
from rayalign.errors import UserError

TOLERANCE = 1e-3
"""Nats per token, or units of score. Float32 rounding stays below 1e-5; a wrong mask is off by about 1."""

LONGEST = 5 * WINDOW
"""Tokens of a sequence that the family is tried on, at most."""

PLAIN = "plain sequences"
Outcome = tuple[Tensor, Tensor]
"""Log-probs of tokens (nats) or scores, and a gradient, relative to its largest entry."""

log = logging.getLogger(__name__)


def choose_attention(model: PreTrainedModel, *, device: torch.device | None = None) -> AttentionKind:
    """How ``model`` is proven to read groups: packed rows where there is a way, else one plain sequence per row.

    The proof compares a float32 forward, and its gradient, with transformers' own of each sequence alone. It is made on
    a random model of the same class and configuration with fewer layers (one of each type), a small vocabulary and a
    window shorter than the sequences (:mod:`rayalign.engine.model.shrunken`). Where no such model can be made, the
    model itself is tried. ``device`` is where the model will compute, if its weights wait elsewhere. The result is
    kept: see :mod:`rayalign.engine.model.proofs`.

    Raises:
        UserError: not even plain sequences give the log-probabilities that transformers gives, or it gives none.
    """
    device = device or model.device
    differences: dict[str, float] = proven(
        "parity", model, partial(measure_attention, model, device=device), device=device
    )
    kinds = attention_kinds(model.config, device)
    for name, difference in differences.items():
        if difference <= TOLERANCE and name in kinds:
            return kinds[name]
    what = "scores" if is_scalar(model) else "log-probs"
    if not differences[PLAIN] <= TOLERANCE:
        unit = "" if is_scalar(model) else " nats"
        raise UserError(
            f"model.name: {what} of {model.config.model_type} models differ by {differences[PLAIN]:.3g}{unit} "
            "from what transformers computes, so this family cannot be trained"
        )
    log.warning(
        "%s models are trained on one sequence per row, which is slower: no way of packing several into a row gives "
        "their %s",
        model.config.model_type,
        what,
    )
    return CONCATENATED_ONLY


def measure_attention(model: PreTrainedModel, *, device: torch.device | None = None) -> dict[str, float]:
    """Way of reading → largest |Δ log-prob| of a token (nats), |Δ score| or |Δ gradient|; infinite where it fails.

    Ways of reading packed rows are tried up to the first that is right; plain sequences are the last entry.
    """
    device = device or model.device
    probe = probe_for(model, device)
    groups = groups_for(probe)
    with computing(model.config):
        expected = plain_outcome(probe, groups)
    loaded = probe.config._attn_implementation
    found = {}
    for name, kind in attention_kinds(probe.config, device).items():
        found[name] = difference_of(probe, groups, kind, expected)
        if found[name] <= TOLERANCE:
            break
    probe.set_attn_implementation(loaded)
    found[PLAIN] = difference_of(probe, groups, CONCATENATED_ONLY, expected)
    return found


def groups_for(model: PreTrainedModel) -> list[Group]:
    context = context_of(model.config)
    return probe_groups(context.tokens if context is not None else LONGEST)


def plain_outcome(model: PreTrainedModel, groups: Sequence[Group]) -> Outcome:
    """By the model's own forward, one sequence at a time."""
    return outcome(model, (plain_score if is_scalar(model) else plain_token_logp)(model, groups))


def outcome(model: PreTrainedModel, values: Float[Tensor, " N"]) -> Outcome:
    """``values``, and the gradient of their weighted sum with respect to the embedding of the tokens."""
    weights = torch.linspace(-1.0, 1.0, len(values), device=values.device)
    embedding = model.get_input_embeddings().weight
    if not embedding.requires_grad:
        return values.detach(), torch.zeros(())
    (gradient,) = torch.autograd.grad((weights * values).sum(), embedding)
    return values.detach(), gradient / gradient.abs().max().clamp(min=1.0)


def plain_token_logp(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " N"]:
    """Response log-probs by the model's own forward, one sequence at a time, in the packer's order."""
    columns = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            columns.append(logp.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0])
    return torch.cat(columns)


def plain_score(model: PreTrainedModel, groups: Sequence[Group]) -> Float[Tensor, " C"]:
    """Every candidate's score by the model's own backbone and head, one sequence at a time."""
    scores = []
    for group in groups:
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long().to(model.device)
            hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
            scores.append(model.score(hidden)[0, -1, 0].float())
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


def difference_of(probe: PreTrainedModel, groups: Sequence[Group], kind: AttentionKind, expected: Outcome) -> float:
    """How far one way of reading is from what is right; infinite where the model does not take it."""
    try:
        batch = pack(
            groups, positions=range(len(groups)), num_candidates=4, pad_id=0, row_tokens=8 * WINDOW, layout=kind.layout
        )
        scores = root_module(probe, kind)(to_device(batch, probe.device), needs=frozenset({"score"}))
        values = scores.score[batch.candidate_mask.to(probe.device)] if is_scalar(probe) else scores.token_logp
        found = outcome(probe, values)
    except FAILURES:
        return math.inf
    errors = [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
