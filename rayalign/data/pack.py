"""Prompt groups → one :class:`PackedBatch`. Pure functions on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayalign.data.group import Column, Group, GroupLengths, TokenIds, check_group
from rayalign.data.rows import Layout, RowBlock, arrange, row_shape
from rayalign.types import PADDING_GROUP, PackedBatch

SUMMED_COLUMNS = {"ref_token_logp": "ref_logp", "behavior_token_logp": "behavior_logp"}
"""Per-token columns whose sums over a candidate's response tokens are per-candidate columns of their own."""

Indices = NDArray[np.int64]


class _Piece(NamedTuple):
    """A prompt or a candidate and where it stands."""

    ids: TokenIds
    start: int
    """Flat position (row * L + column) of its first token."""
    group: int
    branch: int
    position: int
    """Position id of its first token."""
    follows: int
    """Flat position of the token that its first token continues: the prompt's last; -1 on a prompt."""


def group_lengths(group: Group) -> GroupLengths:
    """The numbers of tokens that the plan needs."""
    return GroupLengths(
        prompt=len(group.prompt_ids),
        candidates=tuple(len(candidate.ids) for candidate in group.candidates),
        predicted=tuple(candidate.num_predicted for candidate in group.candidates),
    )


def pack(
    groups: Sequence[Group],
    *,
    positions: Sequence[int],
    num_candidates: int,
    pad_id: int,
    row_tokens: int | None,
    layout: Layout = "packed",
    dummy: bool = False,
) -> PackedBatch:
    """Lays groups out in rows; see :func:`rayalign.data.rows.arrange` for which token stands where.

    Position ids of every candidate continue from its prompt's end, in every layout and in every row that the group is
    spread over. Only predicted tokens (mask True) are among the N tokens, which follow the order of groups and
    candidates whatever the rows. Per-token columns named in :data:`SUMMED_COLUMNS` also give per-candidate sums,
    float32 of a float64 sum; a column that a group lacks is NaN there.

    Args:
        groups: at least one; each with at most ``num_candidates`` candidates.
        positions: position of every group in its stream → ``group_index``.
        num_candidates: K of the batch; groups with fewer candidates are masked.
        pad_id: token id of padding; its group is -1.
        row_tokens: tokens per row aimed at; ``None`` for a single row.
        layout: ``packed`` or ``concatenated``.
        dummy: the batch only keeps workers in step: ``candidate_mask`` is all False.

    Raises:
        ValueError: a group is empty somewhere, has more than K candidates, or carries a column of the wrong length.
    """
    for group in groups:
        check_group(group)
        if not group.candidates:
            raise ValueError(f"{group.source}:{group.line}: the group has no candidate")
        if len(group.candidates) > num_candidates:
            where = f"{group.source}:{group.line}"
            raise ValueError(f"{where}: {len(group.candidates)} candidates in a batch of {num_candidates} per group")
    rows = arrange([group_lengths(group) for group in groups], row_tokens=row_tokens, layout=layout)
    shape = row_shape(rows)
    pieces = _pieces(groups, rows, row_length=shape[1])
    predict_from, target_ids, candidate_of = _predictions(groups, pieces, num_candidates)
    exists = np.zeros((len(groups), num_candidates), dtype=np.bool_)
    for b, group in enumerate(groups):
        exists[b, : len(group.candidates)] = True
    token_names = _names(group.per_token for group in groups)
    candidate_names = _names(group.per_candidate for group in groups)
    per_token = {name: _token_column(name, groups) for name in token_names}
    per_candidate = {name: _candidate_column(name, groups, num_candidates) for name in candidate_names}
    for name, total in SUMMED_COLUMNS.items():
        if name in per_token:
            sums = _segment_sums(per_token[name], candidate_of, exists)
            # A candidate whose tokens are not known one by one may still come with its total.
            per_candidate[total] = np.where(np.isnan(sums), per_candidate.get(total, sums), sums)
    return PackedBatch(
        **_grids(pieces, shape, pad_id),
        parent_of_branch=torch.zeros(num_candidates + 1, dtype=torch.int64),
        predict_from=torch.from_numpy(predict_from),
        target_ids=torch.from_numpy(target_ids),
        candidate_of=torch.from_numpy(candidate_of),
        candidate_mask=torch.from_numpy(exists & (not dummy)),
        group_index=torch.tensor(list(positions), dtype=torch.int64),
        per_candidate={name: torch.from_numpy(column) for name, column in per_candidate.items()},
        per_token={name: torch.from_numpy(column) for name, column in per_token.items()},
    )


def _pieces(groups: Sequence[Group], rows: Sequence[Sequence[RowBlock]], row_length: int) -> list[_Piece]:
    pieces = []
    for row, blocks in enumerate(rows):
        at = row * row_length
        for block in blocks:
            group = groups[block.group]
            prompt_tokens = len(group.prompt_ids)
            prompt = _Piece(group.prompt_ids, at, block.group, branch=0, position=0, follows=-1)
            pieces.append(prompt)
            at += prompt_tokens
            for k in block.candidates:
                ids = group.candidates[k].ids
                prompt_end = prompt.start + prompt_tokens - 1
                pieces.append(_Piece(ids, at, block.group, k + 1, position=prompt_tokens, follows=prompt_end))
                at += len(ids)
    return pieces


def _grids(pieces: Sequence[_Piece], shape: tuple[int, int], pad_id: int) -> dict[str, Tensor]:
    """The four [R, L] tensors."""
    lengths = np.array([len(piece.ids) for piece in pieces])
    starts, groups, branches, positions = np.array([(p.start, p.group, p.branch, p.position) for p in pieces]).T
    offset = _ranges(lengths)
    flat = np.repeat(starts, lengths) + offset
    columns: dict[str, tuple[int, Any]] = {
        "input_ids": (pad_id, np.concatenate([piece.ids for piece in pieces])),
        "position_ids": (0, np.repeat(positions, lengths) + offset),
        "group_ids": (PADDING_GROUP, np.repeat(groups, lengths)),
        "branch_ids": (0, np.repeat(branches, lengths)),
    }
    grids = {}
    for name, (padding, values) in columns.items():
        grid = np.full(shape[0] * shape[1], padding, dtype=np.int64)
        grid[flat] = values
        grids[name] = torch.from_numpy(grid.reshape(shape))
    return grids


def _predictions(
    groups: Sequence[Group], pieces: Sequence[_Piece], num_candidates: int
) -> tuple[Indices, Indices, Indices]:
    """(predict_from, target_ids, candidate_of) of the predicted tokens, in the order of groups and candidates."""
    answers = sorted((piece for piece in pieces if piece.branch > 0), key=lambda piece: (piece.group, piece.branch))
    lengths = np.array([len(piece.ids) for piece in answers])
    starts = np.array([piece.start for piece in answers])
    predict_from = np.repeat(starts, lengths) + _ranges(lengths) - 1
    first_tokens = np.cumsum(lengths) - lengths
    predict_from[first_tokens] = [piece.follows for piece in answers]
    target_ids = np.concatenate([piece.ids for piece in answers]).astype(np.int64)
    owners = np.array([piece.group * num_candidates + piece.branch - 1 for piece in answers])
    candidates = chain.from_iterable(group.candidates for group in groups)
    mask = np.concatenate([candidate.mask for candidate in candidates])
    return predict_from[mask], target_ids[mask], np.repeat(owners, lengths)[mask]


def _ranges(lengths: Indices) -> Indices:
    """0 … n-1 for every n, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _names(columns: Iterable[Mapping[str, Column]]) -> list[str]:
    return sorted(set(chain.from_iterable(columns)))


def _candidate_column(name: str, groups: Sequence[Group], num_candidates: int) -> NDArray[np.float32]:
    column = np.full((len(groups), num_candidates), np.nan, dtype=np.float32)
    for b, group in enumerate(groups):
        if name in group.per_candidate:
            column[b, : len(group.candidates)] = group.per_candidate[name]
    return column


def _token_column(name: str, groups: Sequence[Group]) -> Column:
    def values(group: Group) -> Column:
        if name in group.per_token:
            return group.per_token[name].astype(np.float32, copy=False)
        return np.full(sum(c.num_predicted for c in group.candidates), np.nan, dtype=np.float32)

    return np.concatenate([values(group) for group in groups])


def _segment_sums(column: Column, candidate_of: Indices, exists: NDArray[np.bool_]) -> NDArray[np.float32]:
    sums = np.bincount(candidate_of, weights=column.astype(np.float64), minlength=exists.size)
    return np.where(exists, sums.reshape(exists.shape), np.nan).astype(np.float32)
