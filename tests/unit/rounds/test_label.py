"""Rules that turn scores into preferences, against cases worked out by hand."""

from __future__ import annotations

import re
from collections import Counter
from math import exp, isnan
from pathlib import Path

import pytest

from rayalign.config.policy import LABEL_RULES, PAIR_RULES, PARAMETERS, LabelConfig
from rayalign.errors import UserError
from rayalign.rounds.label import RULES, label, label_key

EQUAL = [4] * 6


def pair(scores: list[float], lengths: list[int] | None = None, *, key: int = 7, **fields: object) -> tuple[int, ...]:
    """Kept candidates of a pairwise method; () for no preference."""
    found = label(scores, lengths or EQUAL[: len(scores)], LabelConfig(**fields), shape="pair", key=key)  # type: ignore[arg-type]
    assert found.preferred or found.kept == (0,)
    return found.kept if found.preferred else ()


@pytest.mark.parametrize(
    ("scores", "lengths", "expected"),
    [
        ([0.1, 0.9, 0.5], [3, 3, 3], (1, 0)),
        ([0.9, 0.9, 0.5], [9, 3, 3], (1, 2)),  # of two best the shortest
        ([0.9, 0.1, 0.1], [9, 3, 8], (0, 2)),  # of two worst the one that is nearest in length
        ([0.5, 0.5, 0.5], [1, 2, 3], ()),
        ([0.5], [1], ()),
    ],
)
def test_best_against_worst(scores: list[float], lengths: list[int], expected: tuple[int, ...]) -> None:
    assert pair(scores, lengths) == expected


@pytest.mark.parametrize(
    ("scores", "rejected", "expected"),
    [
        ([6, 4, 5.5], "minimum", {(0, 1)}),
        ([6, 4, 5, 5.5], "random", {(0, 1), (0, 2)}),  # 5.5 is not a whole point lower
        ([4.9, 1, 2], "random", {()}),  # nothing scores 5
        ([5, 4.5, 4.1], "random", {()}),  # nothing is a point lower
        ([5, 6, 6, 1], "minimum", {(1, 3)}),
    ],
)
def test_the_recipe_of_wpo(scores: list[float], rejected: str, expected: set[tuple[int, ...]]) -> None:
    assert {pair(scores, name="wpo", rejected=rejected, key=key) for key in range(40)} == expected


def test_every_rule_of_the_configuration_is_made_and_said() -> None:
    assert set(RULES) == set(PAIR_RULES) and set(PARAMETERS) <= set(RULES)
    meaning = LabelConfig.model_fields["name"].description or ""
    for name in LABEL_RULES:
        assert name in meaning
    for name in RULES:
        kept = pair([6.0, 2.0], name=name)
        assert sorted(kept) == [0, 1]


def test_a_noisy_labeller_prefers_by_bradley_terry() -> None:
    draws = 4000
    seen = Counter(pair([0.1, 0.3], name="bradley_terry", scale=0.1, key=label_key(0, n)) for n in range(draws))
    assert seen[1, 0] / draws == pytest.approx(1 / (1 + exp(-2.0)), abs=0.02)  # 3 standard errors are 0.015
    of_four = Counter(pair([0, 0, 0, 0], name="bradley_terry", key=label_key(1, n)) for n in range(draws))
    assert len(of_four) == 12 and min(of_four.values()) > 0.8 * draws / 12


def test_what_other_methods_keep() -> None:
    scores, lengths = [0.3, 0.9, 0.1], [2, 2, 2]
    assert label(scores, lengths, LabelConfig(name="rewards"), shape="group", key=0).kept == (0, 1, 2)
    assert label(scores, lengths, LabelConfig(), shape="one", key=0).kept == (1,)
    sides = {label(scores, lengths, LabelConfig(), shape="labelled", key=key) for key in range(20)}
    assert {(found.kept, found.label) for found in sides} == {((1,), 1.0), ((2,), 0.0)}
    assert isnan(label(scores, lengths, LabelConfig(), shape="pair", key=0).label)


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text(
        "def first(scores):\n    return (0, 1) if scores[0] > 0 else None\ndef bad(scores):\n    return 1\n"
    )
    assert pair([1, 2], name=f"{rules}:first") == (0, 1)
    assert pair([0, 2], name=f"{rules}:first") == ()
    with pytest.raises(UserError, match=r"returned 1 for 2 scores: it must return \(chosen, rejected\)"):
        pair([0, 2], name=f"{rules}:bad")


def test_one_position_twice_is_a_tie_where_all_scores_are_equal(tmp_path: Path) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("def ends(s):\n    import numpy as np\n    return np.argmax(s), np.argmin(s)\n")
    assert pair([0.5, 0.5, 0.5], name=f"{rules}:ends") == ()
    assert pair([0.5, 0.5, 0.25], name=f"{rules}:ends") == (0, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import numpy as np\nreturn int(np.argmax(s)), np.argmin(s)", (1, 2)),
        ("import numpy as np\nreturn np.argsort(s)[[-1, 0]]", (1, 2)),
        ("import torch\nreturn torch.tensor(s).argmax(), torch.tensor(s).argmin()", (1, 2)),
        ("return [2, 0]", (2, 0)),
        ("import numpy as np\nreturn np.array([2, 0])", (2, 0)),
        ("import torch\nreturn torch.tensor([2, 0])", (2, 0)),
        ("return None", ()),
        ("import math\nreturn math.nan", ()),
        ("import numpy as np\nreturn np.nan", ()),
        ("import numpy as np\nreturn np.float32('nan')", ()),
        ("import torch\nreturn torch.tensor(float('nan'))", ()),
        ("return (0, 1, 1)", "returned (0, 1, 1) for 3 scores"),
        ("return True", "returned True for 3 scores"),
        ("return {}", "returned {} for 3 scores"),
        ("return (1, 1)", "returned (1, 1) for 3 scores: it must return (chosen, rejected), two different positions"),
        ("return (0, 3)", "returned (0, 3) for 3 scores"),
        ("return (-1, 0)", "returned (-1, 0) for 3 scores"),
        ("return (True, False)", "returned (True, False) for 3 scores"),
        ("return (0.0, 1.0)", "returned (0.0, 1.0) for 3 scores"),
        ("return '01'", "returned '01' for 3 scores"),
        ("return object", "returned <class 'object'> for 3 scores"),
        ("raise KeyError('best')", "raised KeyError: 'best' (at rules.py:2 in f) for the scores [0.5, 2.0, 0.1]"),
        ("import sys; sys.exit(1)", "called sys.exit(1) (at rules.py:2 in f) for the scores"),
        ("import os; os._exit(1)", "ended its process with exit code 1 for the scores"),
        ("while True: pass", "did not return within 0.5 s (it was at rules.py:2 in f) for the scores"),
    ],
)
def test_what_a_rule_of_ones_own_may_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[int, ...] | str
) -> None:
    if text.startswith("while"):
        monkeypatch.setattr("rayalign.rounds.label.RULE_SECONDS", 0.5)
    rules = tmp_path / "rules.py"
    rules.write_text("def f(s):\n    " + text.replace("\n", "\n    ") + "\n")
    if isinstance(expected, tuple):
        assert pair([0.5, 2.0, 0.1], name=f"{rules}:f") == expected
        return
    with pytest.raises(UserError, match=re.escape(f"rules.py:f' {expected}")) as caught:
        pair([0.5, 2.0, 0.1], name=f"{rules}:f")
    assert str(caught.value).startswith("label.name: ")


def test_rankings_keep_all_by_their_rewards_or_the_pair_of_a_rule() -> None:
    whole = label([0.5, 2.0, 0.5], EQUAL[:3], LabelConfig(name="rewards"), shape="ranking", key=7)
    assert (whole.kept, whole.rank, whole.preferred) == ((0, 1, 2), (1.0, 0.0, 1.0), True)
    two = label([0.5, 2.0, 0.4], EQUAL[:3], LabelConfig(name="best_worst"), shape="ranking", key=7)
    assert (two.kept, two.rank) == ((1, 2), (0.0, 1.0))
    for name in ("rewards", "best_worst"):
        tied = label([1.0, 1.0], EQUAL[:2], LabelConfig(name=name), shape="ranking", key=7)
        assert (tied.kept, tied.rank, tied.preferred) == ((0,), (), False)
    assert label([0.5, 2.0], EQUAL[:2], LabelConfig(), shape="pair", key=7).rank == ()
