"""The example of a user's own method works as its README says; one whose parts are of other kinds is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayalign.methods import WPOWeighting, compose, resolve
from rayalign.testing import check_method

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_method"


def test_the_example_resolves_and_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    method = resolve("my_losses:METHOD")
    check_method(method)
    check_method(compose(method, WPOWeighting()))


MISTAKES = """
import json, sys
from dataclasses import replace

from rayalign.data.micro_batches import StepCounts
from rayalign.engine.objective import Objective
from rayalign.errors import UserError
from rayalign.methods import METHODS, Statistics, resolve
from rayalign.testing import random_groups, scored_batch

dpo = resolve("dpo")
scored = scored_batch(random_groups(dpo, num_groups=3), dpo.needs)
counts = StepCounts(**dict.fromkeys(StepCounts.__dataclass_fields__, 3))
parts = [
    {"loss": 3},
    {"metrics": "margin"},
    {"config": dict},
    {"candidates": "pairs"},
    {"needs": frozenset({"ref_log"})},
    {"data_policies": frozenset({"online"})},
]
changes = [
    lambda term: term.per_item,
    lambda term: (replace(term, per_item=term.per_item[:, None]),),
    lambda term: (replace(term, per_item=term.per_item.mean()),),
    lambda term: (replace(term, over="rows"),),
]
METHOD = None
told = []
for part in parts:
    METHOD = replace(dpo, **part)
    try:
        resolve("__main__:METHOD")
    except UserError as error:
        told.append(str(error))
for change in changes:
    method = replace(dpo, loss=lambda *given: change(dpo.loss(*given)[0]))
    try:
        Objective(stream="train", method=method, config=dpo.config()).loss(scored, Statistics(), counts)
    except UserError as error:
        told.append(str(error))
print(json.dumps(told))
"""
"""In a process of its own: while tests run, shapes and types are checked wherever a record is made."""


def test_what_would_be_averaged_wrongly_or_never_read_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", MISTAKES], capture_output=True, text=True, check=True)
    expected = [
        "'__main__:METHOD': loss is 3, which is no function",
        "'__main__:METHOD': metrics is 'margin', which is no function",
        "'__main__:METHOD': config is <class 'dict'>, which is no subclass of rayalign.methods.MethodConfig",
        "'__main__:METHOD': candidates is 'pairs'; write one | pair | ranking | group",
        "'__main__:METHOD': needs has 'ref_log'; there are ref_logp | ",
        "'__main__:METHOD': data_policies has 'online'; there are off_policy | on_policy | hybrid",
        "method 'dpo': its loss returned Tensor, no tuple of Term",
        "term 'dpo': per_item has the shape [3, 1] and mask [3]: give one number per item, which the engine averages",
        "term 'dpo': per_item has the shape [] and mask [3]: give one number per item, which the engine averages",
        "term 'dpo': over 'rows' is none of pairs | groups | sequences | tokens | constant",
    ]
    told = json.loads(done.stdout)
    assert [line.startswith(start) for line, start in zip(told, expected, strict=True)] == [True] * 10, told
