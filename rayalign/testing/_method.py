"""The check that a method keeps what the engine relies on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import get_args

import torch
from torch import Tensor

from rayalign.methods.method import PREPARED, Method, MethodConfig, Over, Statistics, Term
from rayalign.testing._batches import RandomGroup, random_groups, random_round, scored_batch, without
from rayalign.types import MissingNeed, Round, Scored

STEP = 3
DIRECTIONS = 2
"""Random directions along which the gradient is compared with a difference of values."""
SMALL = 1e-6
TOLERANCE = 1e-6


def check_method(method: Method, config: MethodConfig | None = None, *, finite_differences: bool = True) -> None:
    """Check that a method keeps what the engine relies on, on small random batches in float64.

    The terms have a declared scale and shape; gradients are those of the value (say ``finite_differences=False`` for a
    loss that detaches on purpose inside; what comes from columns, statistics or ``step_prepare`` is constant anyway);
    the order of groups and their division into micro-batches do not matter; masked values, NaN included, reach neither
    loss nor gradient; and ``needs`` is what the method reads, no more and no less. ``round_prepare``, where there is
    one, makes the columns that the loss needs, one finite number per token without gradient, from the numbers of the
    round alone: whatever the order of its groups and whatever stands where there is no candidate. A ``critic`` is
    checked alike.

    Raises:
        AssertionError: with a sentence that names what does not hold.
    """
    config = config if config is not None else method.config()
    trials = [_Trial(method=method, config=config)]
    if method.critic is not None:
        trials.append(_Trial(method=method.critic, config=config, prepared_by=method))
    for trial in trials:
        _check(trial, random_groups(method, num_groups=4), finite_differences=finite_differences)


def _check(trial: _Trial, groups: Sequence[RandomGroup], *, finite_differences: bool) -> None:
    trial.check_needs(groups)
    trial.check_round(groups)
    trial.check_terms(groups)
    if finite_differences:
        trial.check_gradient(groups)
    trial.check_order_and_division(groups)
    trial.check_scale(groups)
    trial.check_masks(groups)
    trial.check_metrics(groups)


def step_statistics(
    method: Method, config: MethodConfig, micro_batches: Sequence[Scored], *, groups_per_step: int
) -> Statistics:
    """What ``step_prepare`` makes of a whole step, added up over its micro-batches as the engine does."""
    empty = Statistics(groups_per_step=groups_per_step, seed=0, step=STEP)
    if method.step_prepare is None:
        return empty
    sums: dict[str, Tensor] = {}
    for scored in micro_batches:
        with torch.no_grad():
            for name, value in method.step_prepare(scored, config, empty).items():
                sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + value
    return replace(empty, sums=sums)


def step_loss(method: Method, config: MethodConfig, micro_batches: Sequence[Scored], statistics: Statistics) -> Tensor:
    """Σ over terms and micro-batches of weight · Σ(per_item · mask) / (the step's count of ``over``)."""
    counts = {
        "pairs": sum(int(scored.pair_mask.sum()) for scored in micro_batches),
        "groups": sum(int(scored.group_mask.sum()) for scored in micro_batches),
        "sequences": sum(int(scored.batch.candidate_mask.sum()) for scored in micro_batches),
        "tokens": sum(int(scored.scores.length.sum()) for scored in micro_batches),
        "constant": 1,
    }
    total = torch.zeros((), dtype=torch.float64)
    for scored in micro_batches:
        for term in method.loss(scored, config, statistics):
            count = counts[term.over] if term.count is None else term.count.clamp(min=1)
            total = total + term.weight * torch.where(term.mask, term.per_item, 0).sum() / count
    return total


def num_tokens(group: RandomGroup) -> int:
    """Tokens of all candidates."""
    return sum(map(len, group.token_logp))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    method: Method
    config: MethodConfig
    prepared_by: Method | None = None
    """The method whose critic this one is: it makes the round's columns."""

    def check_needs(self, groups: Sequence[RandomGroup]) -> None:
        needs = self.method.needed(self.config)
        try:
            self.look(groups, needs)
        except MissingNeed as error:
            raise AssertionError(f"method {self.method.name!r}: {error}") from error
        for need in sorted(needs - {"mismatched"}):
            self.require(self.misses(groups, needs - {need}), f"declares the need {need!r} and never reads it")

    def misses(self, groups: Sequence[RandomGroup], needs: frozenset[str]) -> bool:
        try:
            self.look(groups, needs)
        except MissingNeed:
            return True
        return False

    def look(self, groups: Sequence[RandomGroup], needs: frozenset[str]) -> None:
        scored = scored_batch(groups, needs)
        statistics = step_statistics(self.method, self.config, [scored], groups_per_step=len(groups))
        self.method.loss(scored, self.config, statistics)
        if self.method.metrics is not None:
            self.method.metrics(scored, self.config, statistics)
        if self.method.round_prepare is not None:
            self.method.round_prepare(self.round(groups, needs), self.config)

    def round(self, groups: Sequence[RandomGroup], needs: frozenset[str]) -> Round:
        """The groups before they are prepared, with what the method itself ``needs`` and what its critic does."""
        critic = self.method.needed_of_round(self.config) - self.method.needed(self.config)
        return random_round(groups, needs | critic)

    def check_round(self, groups: Sequence[RandomGroup]) -> None:
        if self.prepared_by is not None:
            return
        wanted = self.method.needed_of_round(self.config) & PREPARED
        if self.method.round_prepare is None:
            self.require(not wanted, f"needs {sorted(wanted)}, which a round_prepare must make")
            return
        made = self.prepare(groups)
        self.require(
            made.keys() == wanted, f"prepares the columns {sorted(made)}, and its needs declare {sorted(wanted)}"
        )
        for name, column in made.items():
            label = f"round_prepare's {name!r}"
            shape = (sum(map(num_tokens, groups)),)
            self.require(column.shape == shape, f"{label} must have one number per token, {shape}: {column.shape}")
            self.require(not column.requires_grad, f"{label} carries a gradient")
            self.require(bool(torch.isfinite(column).all()), f"{label} is not finite")
            self.require(bool(torch.equal(column, self.prepare(groups)[name])), f"{label} differs when made again")
            turned = self.by_group(groups[::-1])[name][::-1]
            self.require(
                bool(torch.allclose(torch.cat(turned), column, rtol=1e-9, atol=1e-12)),
                f"{label} depends on the order of groups",
            )
        last = len(groups[0].real) - 1
        masked = [[groups[0], without(groups[1], [last], fill), *groups[2:]] for fill in (-0.5, math.nan)]
        whole = self.round(masked[0], self.method.needed(self.config))
        real = whole.candidate_mask.flatten()[whole.candidate_of]
        finite, with_nan = (self.prepare(part) for part in masked)
        for name in made:
            same = torch.equal(finite[name][real], with_nan[name][real])
            self.require(same, f"round_prepare's {name!r} lets a masked value through")

    def prepare(self, groups: Sequence[RandomGroup]) -> dict[str, Tensor]:
        assert self.method.round_prepare is not None
        return self.method.round_prepare(self.round(groups, self.method.needed(self.config)), self.config)

    def by_group(self, groups: Sequence[RandomGroup]) -> dict[str, list[Tensor]]:
        """What ``round_prepare`` makes, one tensor per group."""
        lengths = list(map(num_tokens, groups))
        return {name: list(torch.split_with_sizes(column, lengths)) for name, column in self.prepare(groups).items()}

    def check_terms(self, groups: Sequence[RandomGroup]) -> None:
        scored = self.score(groups)
        statistics = step_statistics(self.method, self.config, [scored], groups_per_step=len(groups))
        terms = self.method.loss(scored, self.config, statistics)
        self.require(isinstance(terms, tuple) and len(terms) > 0, "must return a tuple of at least one Term")
        names = [term.name for term in terms]
        self.require(len(set(names)) == len(names), f"has terms of the same name: {names}")
        for term in terms:
            self.check_term(term, scored)

    def check_term(self, term: Term, scored: Scored) -> None:
        num_groups, num_candidates = scored.batch.candidate_mask.shape
        items: dict[Over, int] = {
            "pairs": num_groups,
            "groups": num_groups,
            "sequences": num_groups * num_candidates,
            "tokens": len(scored.scores.token_logp),
        }
        label = f"term {term.name!r}"
        self.require(term.over in get_args(Over), f"{label} is over {term.over!r}, which is none of {get_args(Over)}")
        self.require(term.per_item.dim() == 1, f"{label} must be unreduced: per_item has shape {term.per_item.shape}")
        expected = items.get(term.over, len(term.per_item))
        self.require(
            len(term.per_item) == expected,
            f"{label} is over {term.over}, of which the batch has {expected}, and has {len(term.per_item)} items",
        )
        self.require(
            term.mask.dtype == torch.bool and term.mask.shape == term.per_item.shape,
            f"{label} needs a bool mask of the shape of per_item",
        )

    def check_gradient(self, groups: Sequence[RandomGroup]) -> None:
        batch = [self.score(groups)]
        statistics = step_statistics(self.method, self.config, batch, groups_per_step=len(groups))
        gradients = self.gradients(step_loss(self.method, self.config, batch, statistics), groups)
        self.require(any(bool(gradient.any()) for gradient in gradients), "has a gradient of zero everywhere")

        @torch.no_grad()
        def value() -> float:
            return float(step_loss(self.method, self.config, [self.score(groups)], statistics))

        generator = torch.Generator().manual_seed(1)
        for _ in range(DIRECTIONS):
            leaves = self.leaves(groups)
            direction = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
            promised = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
            slope = _slope(value, leaves, direction)
            self.require(
                abs(slope - promised) < TOLERANCE * max(1.0, abs(slope)),
                f"has a gradient of {promised:.6g} where its value changes by {slope:.6g}: "
                "something is detached, or a constant depends on the policy",
            )

    def check_order_and_division(self, groups: Sequence[RandomGroup]) -> None:
        whole = self.total([groups])
        turned = self.total([list(reversed(groups))])
        self.require(_close(whole, turned), f"depends on the order of groups: {whole:.12g} and {turned:.12g}")
        halves = self.total([groups[:1], groups[1:]])
        self.require(
            _close(whole, halves),
            f"depends on how a step is divided into micro-batches: {whole:.12g} whole, {halves:.12g} in two parts",
        )

    def check_scale(self, groups: Sequence[RandomGroup]) -> None:
        once = self.total([groups])
        copies = [replace(group, index=group.index + len(groups)) for group in groups]
        twice = self.total([[*groups, *copies]])
        self.require(
            _close(once, twice),
            f"has the wrong scale: with every group seen twice the loss is {twice:.12g} instead of {once:.12g}; "
            "`over` must name what the term is a mean of",
        )

    def check_masks(self, groups: Sequence[RandomGroup]) -> None:
        candidates = range(len(groups[0].real))
        missing = [(1, [candidates[-1]]), (2, list(candidates))]
        outcomes = []
        for fill in (-0.5, math.nan):
            masked = list(groups)
            for position, which in missing:
                masked[position] = without(masked[position], which, fill)
            batch = [self.score(masked)]
            statistics = step_statistics(self.method, self.config, batch, groups_per_step=len(masked))
            loss = step_loss(self.method, self.config, batch, statistics)
            outcomes.append((float(loss.detach()), self.gradients(loss, masked)))
        (finite, finite_gradients), (with_nan, nan_gradients) = outcomes
        self.require(
            _close(finite, with_nan), f"lets a masked value reach the loss: {with_nan} instead of {finite:.12g}"
        )
        for finite_gradient, nan_gradient in zip(finite_gradients, nan_gradients, strict=True):
            self.require(
                bool(torch.allclose(finite_gradient, nan_gradient, rtol=1e-9, atol=1e-12)),
                f"lets a masked value reach the gradient: {nan_gradient.tolist()}; select with torch.where before "
                "computing, since NaN times 0 is NaN",
            )

    def check_metrics(self, groups: Sequence[RandomGroup]) -> None:
        if self.method.metrics is None:
            return
        masked = [*groups, without(groups[0], range(len(groups[0].real)), math.nan)]
        scored = self.score(masked)
        statistics = step_statistics(self.method, self.config, [scored], groups_per_step=len(masked))
        for name, (total, count) in self.method.metrics(scored, self.config, statistics).items():
            self.require(total.dim() == 0 and count.dim() == 0, f"metric {name!r} must be a scalar sum and count")
            self.require(bool(torch.isfinite(total)), f"metric {name!r} lets a masked value through: {float(total)}")

    def score(self, groups: Sequence[RandomGroup]) -> Scored:
        return scored_batch(groups, self.method.needed(self.config))

    def total(self, micro_batches: Sequence[Sequence[RandomGroup]]) -> float:
        batches = [self.score(groups) for groups in micro_batches]
        groups_per_step = sum(len(groups) for groups in micro_batches)
        statistics = step_statistics(self.method, self.config, batches, groups_per_step=groups_per_step)
        return float(step_loss(self.method, self.config, batches, statistics).detach())

    def leaves(self, groups: Sequence[RandomGroup]) -> list[Tensor]:
        leaves = list(chain.from_iterable(group.token_logp for group in groups))
        if "value" in self.method.needed(self.config):
            leaves += list(chain.from_iterable(group.per_token["value"] for group in groups))
        if "score" in self.method.needed(self.config):
            leaves += list(chain.from_iterable(group.score for group in groups))
        return leaves

    def gradients(self, loss: Tensor, groups: Sequence[RandomGroup]) -> list[Tensor]:
        self.require(loss.requires_grad, "has no gradient: its value does not depend on scored.scores")
        leaves = self.leaves(groups)
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise AssertionError(f"method {self.method.name!r} {sentence}")


@torch.no_grad()
def _slope(value: Callable[[], float], leaves: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """Central difference of ``value`` as the leaves move along ``direction``; they are put back."""

    def value_at(distance: float) -> float:
        before = [leaf.clone() for leaf in leaves]
        for leaf, along in zip(leaves, direction, strict=True):
            leaf.add_(along, alpha=distance)
        moved = value()
        for leaf, original in zip(leaves, before, strict=True):
            leaf.copy_(original)
        return moved

    return (value_at(SMALL) - value_at(-SMALL)) / (2 * SMALL)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
