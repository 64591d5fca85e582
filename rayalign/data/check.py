"""What every group must fulfil before it is stored or packed."""

from __future__ import annotations

from rayalign.data.group import Group


def check_group(group: Group) -> None:
    """Raises ValueError, naming source and line, where something is empty or a column has the wrong length.

    A prompt alone, without candidates, is a group that can be stored.
    """
    where = f"{group.source}:{group.line}"
    if len(group.prompt_ids) == 0:
        raise ValueError(f"{where}: the prompt has no token, so nothing predicts the first response token")
    predicted = [candidate.num_predicted for candidate in group.candidates]
    if 0 in predicted:
        raise ValueError(f"{where}: candidate {predicted.index(0)} has no predicted token")
    for expected, columns in ((len(predicted), group.per_candidate), (sum(predicted), group.per_token)):
        for name, column in columns.items():
            if len(column) != expected:
                raise ValueError(f"{where}: column {name!r} has {len(column)} values, not {expected}")
