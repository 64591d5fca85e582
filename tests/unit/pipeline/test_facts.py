"""What ``run.json`` records of a preparation, and the line that warns of columns that were not read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rayalign.config.data import DataSource
from rayalign.data.records import BadRow
from rayalign.data.tokenize_rows import UnitReport
from rayalign.errors import UserError
from rayalign.run.facts import preparation_counts, refuse_absent_columns, warning
from rayalign.runtime.datasets import StorePreparation


def report(**fields: Any) -> UnitReport:
    given: dict[str, Any] = {
        "shards": (),
        "rows": 4,
        "bad": 1,
        "bad_rows": (BadRow(source="f", line=1, reason="r"),),
        "dropped": 2,
        "undecided": 1,
        "truncated_prompts": 1,
        "truncated_responses": 0,
        "rules": {},
        "formats": Counter(orca=3),
        "unread": Counter(rating=2),
        "metadata": Counter(id=4),
        "named": frozenset({"instructions"}),
    }
    return UnitReport(**given | fields)


FOUND = StorePreparation(reports=(report(), report(unread=Counter(rating=1, mood=4))), rows_by_node={})


def test_counts_of_all_chunks_add_up() -> None:
    facts = preparation_counts(FOUND)
    assert {name: facts[name] for name in ("rows", "bad", "dropped", "undecided")} == {
        "rows": 8,
        "bad": 2,
        "dropped": 4,
        "undecided": 2,
    }
    assert (facts["formats"], facts["not_read"], facts["metadata_not_read"]) == (
        {"orca": 6},
        {"mood": 4, "rating": 3},
        {"id": 8},
    )


def test_a_warning_names_what_was_not_read_and_nothing_else() -> None:
    facts = preparation_counts(FOUND)
    assert warning("pairs", facts) == (
        "warning: pairs: not read: mood (4 of 8 rows), rating (3 of 8 rows); name what is meant with `columns`"
    )
    assert warning("pairs", facts | {"not_read": {}}) == "" and warning("pairs", {}) == ""


def test_a_column_that_no_row_has_is_refused() -> None:
    refuse_absent_columns(DataSource(path="pairs.jsonl", columns={"system": "instructions"}), FOUND)
    with pytest.raises(UserError, match="pairs: columns names sytsem as system, and no row has it"):
        refuse_absent_columns(DataSource(path="pairs.jsonl", columns={"system": "sytsem"}), FOUND)
