"""Random batches as the engine shows them to a loss, small and in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from torch import Tensor

from rayalign.functional.logprobs import count_per_candidate, sum_per_candidate
from rayalign.methods.method import PREPARED, Method, MethodConfig
from rayalign.types import PackedBatch, Round, Scored, Scores

PER_CANDIDATE = ("ref_logp", "behavior_logp", "reward", "label", "soft_label", "margin", "rank")
PER_TOKEN = ("ref_token_logp", "behavior_token_logp", "advantage", "return", "old_value")
TOKEN_STATISTICS = ("log_sum_p2", "log_max_p", "plain_token_logp", "entropy", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomGroup:
    """The numbers of one prompt group, in float64: everything a loss can see of it."""

    index: int
    real: tuple[bool, ...]
    """Which of the K candidates exist."""
    token_logp: tuple[Tensor, ...]
    """[tokens] for each candidate; a leaf that gradients flow to."""
    per_candidate: Mapping[str, tuple[float, ...]]
    per_token: Mapping[str, tuple[Tensor, ...]]
    """Columns and token statistics: [tokens] for each candidate."""
    score: tuple[Tensor, ...]
    """A scalar for each candidate; a leaf."""


def random_groups(method: Method, *, num_groups: int, seed: int = 0) -> list[RandomGroup]:
    """Groups with as many candidates as the method takes: 1, 2 or 4 of one to four tokens each."""
    num_candidates = {"one": 2 if "mismatched" in method.needs else 1, "pair": 2, "ranking": 4, "group": 4}[
        method.candidates
    ]
    generator = torch.Generator().manual_seed(seed)
    return [random_group(index, num_candidates, generator) for index in range(num_groups)]


def random_group(index: int, num_candidates: int, generator: torch.Generator) -> RandomGroup:
    """One group with every column and statistic that a method can need."""
    lengths = (torch.randint(1, 5, (num_candidates,), generator=generator)).tolist()

    def tokens(low: float, high: float) -> tuple[Tensor, ...]:
        return tuple(
            low + (high - low) * torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths
        )

    def column(low: float, high: float) -> tuple[float, ...]:
        drawn = torch.rand(num_candidates, generator=generator, dtype=torch.float64)
        return tuple((low + (high - low) * drawn).tolist())

    token_logp, ref, behavior = tokens(-3, -0.1), tokens(-3, -0.1), tokens(-3, -0.1)
    log_max_p = tuple(logp * share for logp, share in zip(token_logp, tokens(0.2, 1), strict=True))
    per_token = {
        "ref_token_logp": ref,
        "behavior_token_logp": behavior,
        "advantage": tokens(-1, 1),
        "return": tokens(-1, 1),
        "old_value": tokens(-1, 1),
        "log_max_p": log_max_p,
        "log_sum_p2": tuple(1.5 * values for values in log_max_p),
        "plain_token_logp": token_logp,
        "entropy": tokens(0.1, 2),
        "value": tokens(-1, 1),
    }
    per_candidate = {
        "ref_logp": tuple(float(values.sum()) for values in ref),
        "behavior_logp": tuple(float(values.sum()) for values in behavior),
        "reward": column(-1, 1),
        "label": tuple(float((index + k) % 2) for k in range(num_candidates)),
        # NaN is a legal entry of these two: it means 1 and 0.
        "soft_label": column(0, 1) if index else (math.nan,) * num_candidates,
        "margin": column(0, 1) if index else (math.nan,) * num_candidates,
        # With a tie from three candidates on.
        "rank": tuple(
            float(max(0, (k + index) % num_candidates - (num_candidates > 2))) for k in range(num_candidates)
        ),
    }
    scores = torch.rand(num_candidates, generator=generator, dtype=torch.float64)
    leaves = tuple(values.clone().requires_grad_() for values in token_logp)
    per_token["value"] = tuple(values.requires_grad_() for values in per_token["value"])
    return RandomGroup(
        index=index,
        real=(True,) * num_candidates,
        token_logp=leaves,
        per_candidate=per_candidate,
        per_token=per_token,
        score=tuple(score.clone().requires_grad_() for score in scores),
    )


def without(group: RandomGroup, missing: Sequence[int], fill: float) -> RandomGroup:
    """The group in which the ``missing`` candidates do not exist and every number of theirs is ``fill``."""

    def tokens(columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = list(columns)
        for k in set(missing) & set(range(len(columns))):
            changed[k] = torch.full_like(columns[k], fill).requires_grad_(columns[k].requires_grad)
        return tuple(changed)

    def column(values: tuple[float, ...]) -> tuple[float, ...]:
        changed = list(values)
        for k in set(missing) & set(range(len(values))):
            changed[k] = fill
        return tuple(changed)

    return replace(
        group,
        real=tuple(exists and k not in missing for k, exists in enumerate(group.real)),
        token_logp=tokens(group.token_logp),
        per_candidate={name: column(values) for name, values in group.per_candidate.items()},
        per_token={name: tokens(columns) for name, columns in group.per_token.items()},
        score=tokens(group.score),
    )


def scored_batch(groups: Sequence[RandomGroup], needs: frozenset[str]) -> Scored:
    """The groups as one micro-batch; it carries only the columns and statistics in ``needs``."""
    num_groups, num_candidates = len(groups), len(groups[0].real)
    candidate_of = owner_indices(groups)
    shape = {"num_groups": num_groups, "num_candidates": num_candidates}

    token_logp = torch.cat(list(chain.from_iterable(group.token_logp for group in groups)))
    real = torch.tensor([group.real for group in groups])
    nothing = torch.zeros((0, 0), dtype=torch.long)
    batch = PackedBatch(
        input_ids=nothing,
        position_ids=nothing,
        group_ids=nothing,
        branch_ids=nothing,
        parent_of_branch=torch.zeros(num_candidates + 1, dtype=torch.long),
        predict_from=torch.arange(len(token_logp)),
        target_ids=torch.zeros(len(token_logp), dtype=torch.long),
        candidate_of=candidate_of,
        candidate_mask=real,
        group_index=torch.tensor([group.index for group in groups]),
        per_candidate=candidate_columns(groups, needs),
        per_token={name: token_column(groups, name) for name in PER_TOKEN if name in needs},
    )
    scores = Scores(
        token_logp=token_logp,
        logp=sum_per_candidate(token_logp, candidate_of, **shape),
        length=count_per_candidate(candidate_of, **shape) * real,
        **{name: token_column(groups, name) for name in TOKEN_STATISTICS if name in needs},
        score=torch.stack([torch.stack(group.score) for group in groups]) if "score" in needs else None,
    )
    return Scored(batch=batch, scores=scores, needs=needs)


def random_round(groups: Sequence[RandomGroup], needs: frozenset[str]) -> Round:
    """The groups as a whole round, with the columns in ``needs`` that a round has before it is prepared."""
    return Round(
        candidate_of=owner_indices(groups),
        candidate_mask=torch.tensor([group.real for group in groups]),
        per_candidate=candidate_columns(groups, needs),
        per_token={name: token_column(groups, name) for name in PER_TOKEN if name in needs - PREPARED},
        needs=needs,
    )


def token_column(groups: Sequence[RandomGroup], name: str) -> Tensor:
    """[N], candidate after candidate."""
    return torch.cat(list(chain.from_iterable(group.per_token[name] for group in groups)))


def prepared_groups(method: Method, config: MethodConfig, groups: Sequence[RandomGroup]) -> list[RandomGroup]:
    """The groups with the columns that ``round_prepare`` makes of them; as they are where it makes none."""
    if method.round_prepare is None:
        return list(groups)
    made = method.round_prepare(random_round(groups, method.needed_of_round(config)), config)
    lengths = list(map(len, chain.from_iterable(group.token_logp for group in groups)))
    parts = {name: iter(torch.split_with_sizes(column, lengths)) for name, column in made.items()}
    prepared = []
    for group in groups:
        own = {name: tuple(islice(part, len(group.token_logp))) for name, part in parts.items()}
        prepared.append(replace(group, per_token={**group.per_token, **own}))
    return prepared


def owner_indices(groups: Sequence[RandomGroup]) -> Tensor:
    """``candidate_of`` [N]."""
    lengths = list(map(len, chain.from_iterable(group.token_logp for group in groups)))
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def candidate_columns(groups: Sequence[RandomGroup], needs: frozenset[str]) -> dict[str, Tensor]:
    found = {}
    for name in PER_CANDIDATE:
        if name in needs:
            rows = [group.per_candidate[name] for group in groups]
            found[name] = torch.tensor(rows, dtype=torch.float64)
    return found
