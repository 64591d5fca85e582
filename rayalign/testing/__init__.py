"""What someone who extends rayalign runs in their own tests.

from rayalign.testing import check_method

def test_my_method():
    check_method(METHOD)

:class:`FakeScorer` and :class:`FakeJudge` replace what scores and compares replies: their answers are a table.
"""

from rayalign.testing._batches import (
    RandomGroup,
    prepared_groups,
    random_groups,
    random_round,
    scored_batch,
    without,
)
from rayalign.testing._engine import check_engine
from rayalign.testing._judge import FakeJudge, FakeScorer
from rayalign.testing._method import check_method, step_loss, step_statistics

__all__ = [
    "FakeJudge",
    "FakeScorer",
    "RandomGroup",
    "check_engine",
    "check_method",
    "prepared_groups",
    "random_groups",
    "random_round",
    "scored_batch",
    "step_loss",
    "step_statistics",
    "without",
]
