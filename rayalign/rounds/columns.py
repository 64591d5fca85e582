"""What a method wants to know of a whole round before it trains on it: columns made once and laid over the round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rayalign.data.shard import write_column_shard
from rayalign.data.store import TokenStore, commit_columns
from rayalign.methods.method import PREPARED, Method, MethodConfig
from rayalign.storage.cache import working
from rayalign.storage.place import Place
from rayalign.types import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPreparation:
    """A method's ``round_prepare`` with its parameters; plain values, so that it travels between processes."""

    method: Method
    config: MethodConfig
    key: str
    """Names what is made: other parameters or another source of the method make other columns."""


def prepare_columns(
    store: TokenStore, directory: Place, preparation: RoundPreparation, *, old_value: Tensor | None = None
) -> TokenStore:
    """Commit the columns that the method makes of all groups of ``store``, as one round, and lay them over it.

    Equal stores make equal bytes, so that columns whose writer died are simply made again. ``old_value`` [N] is what a
    critic says of the round; it is committed with them.

    Raises:
        ValueError: the method made a column of another length, or one that its needs do not declare.
    """
    method, config = preparation.method, preparation.config
    needs = method.needed_of_round(config)
    lengths = store.index.whole().num_predicted.tolist()
    assert method.round_prepare is not None
    prepared = read_round(store, needs)
    if old_value is not None:
        prepared = replace(prepared, per_token={**prepared.per_token, "old_value": old_value.double()})
    with torch.no_grad():
        made = method.round_prepare(prepared, config)
    for name, column in made.items():
        if name not in needs & PREPARED or column.shape != (sum(lengths),):
            raise ValueError(
                f"method {method.name!r} prepared a column {name!r} of shape {tuple(column.shape)}; its needs declare "
                f"{sorted(needs & PREPARED)}, one number for each of {sum(lengths)} tokens"
            )
    if old_value is not None:
        made = {**made, "old_value": old_value}
    per_token = {}
    for name, column in made.items():
        parts = torch.split_with_sizes(column.float(), lengths)
        per_token[name] = [part.numpy() for part in parts]
    with working(directory) as folder:
        shard = write_column_shard(folder, "prepared", first=0, per_token=per_token)
    facts = critic_facts(made["old_value"], made["return"]) if old_value is not None and "return" in made else {}
    meta = {"method": method.name, "parameters": config.model_dump(mode="json"), "facts": facts}
    return commit_columns(directory, store, [shard], meta=meta)


def critic_facts(value: Tensor, returns: Tensor) -> dict[str, float]:
    """How much of the returns' variance over the round the critic's values explain: 1 is all, below 0 worse than none.

    Nothing where the returns are all equal.
    """
    told = ~returns.isnan()
    value, returns = value[told].double(), returns[told].double()
    if len(returns) < 2 or returns.min() == returns.max():
        return {}
    return {"critic/explained_variance": 1 - float((returns - value).var() / returns.var())}


def read_round(store: TokenStore, needs: frozenset[str]) -> Round:
    """The columns in ``needs`` of every group of ``store``."""
    index = store.index.whole()
    mask = np.arange(int(index.num_candidates.max(initial=1))) < index.num_candidates[:, None]
    owners = np.repeat(np.flatnonzero(mask), index.candidate_predicted)
    of_tokens = store.token_columns
    per_candidate, per_token = {}, {}
    for name in sorted(needs & store.column_names):
        values = np.concatenate([np.empty(0, np.float32), *(part for _, part in store.column(name))])
        if name in of_tokens:
            per_token[name] = as_float64(values)
        else:
            column = np.full(mask.shape, np.nan)
            column[mask] = values
            per_candidate[name] = as_float64(column)
    return Round(
        candidate_of=torch.from_numpy(owners),
        candidate_mask=torch.from_numpy(mask),
        per_candidate=per_candidate,
        per_token=per_token,
        needs=needs,
    )


def as_float64(column: np.ndarray) -> Tensor:
    return torch.from_numpy(column.astype(np.float64))
