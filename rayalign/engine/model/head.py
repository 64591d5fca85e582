"""Token log-probabilities from hidden states, without a ``[tokens, V]`` tensor ever existing whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Bytes of logits that exist at a time: hundreds of tokens, so that matrix products run at full speed."""

STATISTICS = ("log_sum_p2", "log_max_p", "plain_token_logp", "entropy")
"""What else one forward can say of every token, without gradient and at temperature 1; see :class:`Scores`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """From hidden states to logits: ``softcap · tanh(scale · (h Wᵀ + bias) / softcap) / temperature``."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    chunk_bytes: int | None = None
    """Bytes of logits that exist at a time; by default what :data:`CHUNK_BYTES` says of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInput:
    """From what one model's next-token distributions at N positions are computed."""

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    form: HeadForm


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    target_ids: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    form: HeadForm | None = None,
    statistics: frozenset[str] = frozenset(),
) -> dict[str, Float[Tensor, " N"]]:
    """``token_logp`` = log softmax(logits)[target], with gradient, and the named :data:`STATISTICS`, without.

    Matrix products run in autocast's dtype where autocast is on, softmax and reductions in float32 (float64 for float64
    weights). The backward pass computes the logits again, chunk by chunk; only the last chunk is kept for it.
    """
    names = tuple(name for name in STATISTICS if name in statistics)
    outputs = _ChunkedHead.apply(hidden, weight, bias, target_ids, form or HeadForm(), names)  # type: ignore[no-untyped-call]
    return dict(zip(("token_logp", *names), outputs, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDivergence:
    """Two models at the same N positions, nats, float32 or wider."""

    logp: Float[Tensor, " N"]
    """Log-probability of the target under the policy."""
    ref_logp: Float[Tensor, " N"]
    kl: Float[Tensor, " N"]
    """Σ_v π(v) (log π(v) − log π_ref(v)) over the whole vocabulary; NaN where the two vocabularies differ in size."""


@torch.no_grad()
def token_divergence(policy: HeadInput, reference: HeadInput, target_ids: Int[Tensor, " N"]) -> TokenDivergence:
    """The exact KL(π‖π_ref) of every token's distribution, without gradient, chunk by chunk over the tokens.

    Of logits there are never more than one chunk of each model; softmax and sums are at least float32.
    """
    ours, theirs = (_Logits(given.hidden, given.weight, given.bias, given.form) for given in (policy, reference))
    dtype = torch.promote_types(ours.dtype, theirs.dtype)
    logp, ref_logp, kl = (policy.hidden.new_empty(len(target_ids), dtype=dtype) for _ in range(3))
    same_vocabulary = len(policy.weight) == len(reference.weight)
    chunks = max(ours.chunks, theirs.chunks, key=len)  # the shorter ones fit both buffers
    for rows in chunks:
        own = torch.log_softmax(ours.tempered(ours(rows)).to(dtype), dim=1)
        other = torch.log_softmax(theirs.tempered(theirs(rows)).to(dtype), dim=1)
        logp[rows] = own.gather(1, target_ids[rows, None])[:, 0]
        ref_logp[rows] = other.gather(1, target_ids[rows, None])[:, 0]
        kl[rows] = (own.exp() * (own - other)).sum(dim=1) if same_vocabulary else torch.nan
    return TokenDivergence(logp=logp, ref_logp=ref_logp, kl=kl)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        form: HeadForm,
        statistics: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        logits_of = _Logits(hidden, weight, bias, form)
        token_logp = hidden.new_empty(len(target_ids), dtype=logits_of.dtype)
        log_normalizer = torch.empty_like(token_logp)
        columns = {name: torch.empty_like(token_logp) for name in statistics}
        for rows in logits_of.chunks:
            logits = logits_of(rows)
            target = target_ids[rows, None]
            if statistics:
                for name, column in _token_statistics(logits, target, statistics).items():
                    columns[name][rows] = column
            logits = logits_of.tempered(logits)
            token_logp[rows] = logits.gather(1, target)[:, 0]
            log_normalizer[rows] = _logsumexp_in_place(logits)
        token_logp -= log_normalizer
        ctx.save_for_backward(hidden, weight, bias, target_ids, log_normalizer)
        ctx.form, ctx.matmul_dtype = form, logits_of.matmul_dtype
        ctx.exponentials = logits_of.buffer if any(ctx.needs_input_grad) and form.softcap is None else None
        ctx.mark_non_differentiable(*columns.values())
        return (token_logp, *columns.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, log_normalizer = ctx.saved_tensors
        form: HeadForm = ctx.form
        exponentials, ctx.exponentials = ctx.exponentials, None  # of the last chunk; used up here
        logits_of = _Logits(hidden, weight, bias, form, matmul_dtype=ctx.matmul_dtype, buffer=exponentials)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=logits_of.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=logits_of.dtype) if needs_bias else None
        coefficient = (grad * (form.scale / form.temperature))[:, None]
        for rows in reversed(logits_of.chunks):
            residual = logits_of.residual(rows, target_ids[rows, None], log_normalizer[rows, None], exponentials)
            exponentials = None
            low = residual.to(logits_of.matmul_dtype)
            if grad_hidden is not None:
                torch.mul(low @ logits_of.weight, -coefficient[rows], out=grad_hidden[rows])
            if grad_weight is not None:
                scaled = (logits_of.hidden[rows] * coefficient[rows]).to(logits_of.matmul_dtype)
                _subtract_product(grad_weight, low.t(), scaled)
            if grad_bias is not None:
                grad_bias.sub_((residual * coefficient[rows]).sum(dim=0))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _Logits:
    """Logits of a run of tokens, in a buffer that the next run overwrites."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: HeadForm,
        *,
        matmul_dtype: torch.dtype | None = None,
        buffer: Tensor | None = None,
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.matmul_dtype = matmul_dtype or _matmul_dtype(weight)
        self.hidden = hidden.to(self.matmul_dtype)
        self.weight = weight.to(self.matmul_dtype)
        self.bias = bias
        self.form = form
        num_tokens, vocabulary = len(hidden), weight.shape[0]
        chunk_bytes = form.chunk_bytes or CHUNK_BYTES[hidden.device.type]
        rows = max(1, min(num_tokens, chunk_bytes // (vocabulary * self.dtype.itemsize)))
        self.chunks = [slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows)]
        self.buffer = hidden.new_empty((rows, vocabulary), dtype=self.dtype) if buffer is None else buffer

    def __call__(self, rows: slice) -> Tensor:
        """Scaled and capped logits of these tokens, before the temperature; the caller may write into them."""
        logits = self.buffer[: rows.stop - rows.start]
        if self.matmul_dtype == self.dtype:
            torch.mm(self.hidden[rows], self.weight.t(), out=logits)
        else:
            logits.copy_(self.hidden[rows] @ self.weight.t())
        if self.bias is not None:
            logits.add_(self.bias)
        if self.form.scale != 1.0:
            logits.mul_(self.form.scale)
        if self.form.softcap is not None:
            logits.div_(self.form.softcap).tanh_().mul_(self.form.softcap)
        return logits

    def residual(self, rows: slice, target: Tensor, log_normalizer: Tensor, exponentials: Tensor | None) -> Tensor:
        """softmax − onehot times the slope of the cap, from the exponentials of these logits where they were kept."""
        slope = None
        if exponentials is not None:
            p = exponentials[: rows.stop - rows.start]
            p.div_(p.sum(dim=1, keepdim=True))
        else:
            logits = self(rows)
            if self.form.softcap is not None:
                slope = 1 - (logits / self.form.softcap).square_()
            p = self.tempered(logits).sub_(log_normalizer).exp_()
        p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
        return p if slope is None else p.mul_(slope)

    def tempered(self, logits: Tensor) -> Tensor:
        return logits if self.form.temperature == 1.0 else logits.div_(self.form.temperature)


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _logsumexp_in_place(logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    maximum = logits.amax(dim=1, keepdim=True)
    return logits.sub_(maximum).exp_().sum(dim=1).log_().add_(maximum[:, 0])


def _token_statistics(
    logits: Float[Tensor, "n V"], target: Int[Tensor, "n 1"], names: tuple[str, ...]
) -> dict[str, Float[Tensor, " n"]]:
    """log_softmax comes first: its differences are exact where those of large log-sums are not."""
    logp = torch.log_softmax(logits, dim=1)
    values = {"plain_token_logp": logp.gather(1, target)[:, 0], "log_max_p": logp.amax(dim=1)}
    if "entropy" in names:
        values["entropy"] = -(logp.exp() * logp).sum(dim=1)
    values["log_sum_p2"] = torch.linalg.vector_norm(logp.exp_(), dim=1).log_().mul_(2)
    return {name: values[name] for name in names}


def _subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total −= left · right, in the total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=-1.0)
    else:
        total.sub_(left @ right)
