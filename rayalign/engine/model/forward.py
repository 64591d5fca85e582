"""The root modules: a packed micro-batch → what a policy, or a model with a scalar head, says about it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig, PreTrainedModel

from rayalign.engine.model.attention import AttentionKind, attention_inputs, first_kind
from rayalign.engine.model.head import HeadForm, HeadInput, token_logprobs
from rayalign.engine.model.scalar import is_scalar
from rayalign.errors import UserError
from rayalign.functional.logprobs import at_least_float32, count_per_candidate, sum_per_candidate
from rayalign.types import PackedBatch, Scores

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
"""Settings that logits are multiplied by."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Settings that logits are divided by."""
MULTIPLIED = frozenset({"hyperclovax"})
"""Types that multiply by ``logits_scaling``, which others divide by."""

pytree.register_dataclass(Scores)  # FSDP2 finds the tensors whose gradients it must wait for by flattening the output


class Policy(nn.Module):
    """A causal language model that reads packed prompt groups and answers with :class:`Scores`.

    Every parameter is used inside this module's forward, the LM head included, so that whatever shards or averages
    parameters (DDP, FSDP2) wraps this module and nothing else.

    Args:
        model: float32 parameters and no dropout (see :func:`rayalign.engine.model.pretrained.load_policy`).
        attention: how the model takes masks, as :func:`rayalign.engine.model.parity.choose_attention` has proven it.
            None: the way that would be tried first, unproven.
        chunk_bytes: bytes of logits that exist at a time; chosen by device where None.
    """

    def __init__(
        self, model: PreTrainedModel, *, attention: AttentionKind | None = None, chunk_bytes: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.attention = attended(model, attention)
        self.head_form = head_form(model, chunk_bytes=chunk_bytes)

    def forward(
        self, batch: PackedBatch, *, needs: frozenset[str] = frozenset(), logit_temperature: float = 1.0
    ) -> Scores:
        """Log-probabilities of the response tokens, with gradient; ``needs`` names the token statistics wanted."""
        given = self.head_input(batch, logit_temperature=logit_temperature)
        columns = token_logprobs(
            given.hidden, given.weight, batch.target_ids, bias=given.bias, form=given.form, statistics=needs
        )
        B, K = batch.candidate_mask.shape
        logp = sum_per_candidate(columns["token_logp"], batch.candidate_of, num_groups=B, num_candidates=K)
        length = count_per_candidate(batch.candidate_of, num_groups=B, num_candidates=K)
        return Scores(**columns, logp=logp.clone(), length=length)  # a clone: FSDP2 warns of outputs that are views

    def head_input(self, batch: PackedBatch, *, logit_temperature: float = 1.0) -> HeadInput:
        """What the distribution of every response token is computed from."""
        hidden = hidden_states(self.model, self.attention, batch)
        head = self.model.get_output_embeddings()
        vocabulary = getattr(self.model.config.get_text_config(), "unpadded_vocab_size", None)  # Inkling cuts the rest
        return HeadInput(
            hidden=hidden.flatten(0, 1).index_select(0, batch.predict_from),
            weight=head.weight[:vocabulary],
            bias=head.bias[:vocabulary] if head.bias is not None else None,
            form=replace(self.head_form, temperature=logit_temperature),
        )


class ScalarModel(nn.Module):
    """A backbone with a scalar head that reads packed prompt groups: a reward model, or a critic.

    The same rule about parameters holds as for :class:`Policy`. It answers the needs ``score`` (the head on each
    candidate's last token) and ``value`` (on the state that each token is predicted from), float32 or wider whatever
    autocast says; its log-probabilities are NaN.
    """

    def __init__(self, model: PreTrainedModel, *, attention: AttentionKind | None = None) -> None:
        super().__init__()
        self.model = model
        self.attention = attended(model, attention)

    def forward(
        self, batch: PackedBatch, *, needs: frozenset[str] = frozenset(), logit_temperature: float = 1.0
    ) -> Scores:
        """Scalars with gradient, those that ``needs`` names; there are no logits to temper."""
        hidden = hidden_states(self.model, self.attention, batch).flatten(0, 1)
        B, K = batch.candidate_mask.shape
        score = value = None
        if "score" in needs:
            score = self._head(hidden.index_select(0, last_positions(batch).flatten())).view(B, K)
        if "value" in needs:
            value = self._head(hidden.index_select(0, batch.predict_from))
        nothing = torch.full_like(batch.predict_from, torch.nan, dtype=torch.float32)
        return Scores(
            token_logp=nothing,
            logp=nothing.new_full((B, K), torch.nan),
            length=count_per_candidate(batch.candidate_of, num_groups=B, num_candidates=K),
            value=value,
            score=score,
        )

    def _head(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, " n"]:
        with torch.autocast(hidden.device.type, enabled=False):
            states = at_least_float32(hidden)
            return nn.functional.linear(states, self.model.score.weight.to(states.dtype))[:, 0].clone()


RootModule = Policy | ScalarModel


def root_module(model: PreTrainedModel, attention: AttentionKind) -> RootModule:
    """What reads packed groups with ``model``, by the head that it has."""
    return ScalarModel(model, attention=attention) if is_scalar(model) else Policy(model, attention=attention)


def attended(model: PreTrainedModel, attention: AttentionKind | None) -> AttentionKind:
    """``attention``, whose function ``model`` uses from now on."""
    kind = attention or first_kind(model.config, model.device)
    if kind.implementation is not None and kind.implementation != model.config._attn_implementation:
        model.set_attn_implementation(kind.implementation)
    return kind


def hidden_states(model: PreTrainedModel, attention: AttentionKind, batch: PackedBatch) -> Float[Tensor, "R L H"]:
    """The backbone's last hidden states, every candidate seeing its prompt and itself."""
    device = batch.input_ids.device.type
    autocast = torch.is_autocast_enabled(device)
    inputs = attention_inputs(
        batch,
        attention,
        model.config._attn_implementation,
        torch.get_autocast_dtype(device) if autocast else model.dtype,
    )
    backbone = model.model if model.base_model is model else model.base_model
    output = backbone(input_ids=batch.input_ids, use_cache=False, return_dict=True, **inputs)
    hidden: Tensor = output.last_hidden_state
    return hidden


def last_positions(batch: PackedBatch) -> Int[Tensor, "B K"]:
    """Flat position (row * L + column) of each candidate's last token; 0 where there is no candidate.

    A candidate is in one row as a whole, in order, so its last token has the largest position.
    """
    B, K = batch.candidate_mask.shape
    groups, branches = batch.group_ids.flatten(), batch.branch_ids.flatten()
    owner = torch.where(branches > 0, groups * K + branches - 1, B * K)  # which nothing reads
    position = torch.arange(len(owner), device=owner.device)
    return position.new_zeros(B * K + 1).scatter_reduce(0, owner, position, "amax")[: B * K].view(B, K)


def head_form(model: PreTrainedModel, *, chunk_bytes: int | None = None) -> HeadForm:
    """What the family does between its LM head and the softmax, by its configuration.

    Raises:
        UserError: the model has no plain linear LM head.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UserError(
            f"model.name: {model.config.model_type} models have no linear LM head, so they cannot be trained"
        )
    config = model.config.get_text_config()
    return HeadForm(
        scale=logit_scale(config),
        softcap=next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None),
        chunk_bytes=chunk_bytes,
    )


def logit_scale(config: PretrainedConfig) -> float:
    """The factor between LM head and softmax."""
    factors = [float(getattr(config, name, None) or 1.0) for name in FACTORS]
    divisor = math.prod(float(getattr(config, name, None) or 1.0) for name in DIVISORS)
    return math.prod(factors) * (divisor if config.model_type in MULTIPLIED else 1 / divisor)
