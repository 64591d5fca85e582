"""What someone who extends rayalign runs in their own tests.

from rayalign.testing import check_method

def test_my_method():
    check_method(METHOD)
"""

from rayalign.testing._batches import RandomGroup, prepared_groups, random_groups, random_round, scored_batch, without
from rayalign.testing._engine import check_engine
from rayalign.testing._method import check_method, step_loss, step_statistics

__all__ = [
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
