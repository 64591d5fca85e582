"""What a comparison may hold, and that it comes back from its file as it went."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic_comparison import against_another, comparison_input, judged, make_comparison

from rayalign.errors import UserError
from rayalign.report.points import ComparisonRecord, load_comparison, save_comparison


def small() -> dict[str, Any]:
    return comparison_input(num_prompts=3, num_samples=2)


def test_round_trip_keeps_every_number(tmp_path: Path) -> None:
    given = small()
    given["reference"][0]["scores"]["oracle"] = [[0.1 + 0.2, math.nan], [None, 1e-300], [1 / 3, 2.0]]
    comparison = ComparisonRecord.model_validate(given)
    save_comparison(comparison, tmp_path)
    assert load_comparison(tmp_path) == comparison
    assert comparison.reference[0].scores["oracle"] == ((0.1 + 0.2, None), (None, 1e-300), (1 / 3, 2.0))


def test_saving_leaves_one_file(tmp_path: Path) -> None:
    save_comparison(make_comparison(num_prompts=3), tmp_path / "new")
    save_comparison(make_comparison(num_prompts=4), tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["comparison.json"]


def ragged(given: dict[str, Any]) -> None:
    given["cells"][0]["points"][0]["length"] = [[1.0], [1.0, 2.0], [1.0]]


def infinite(given: dict[str, Any]) -> None:
    given["cells"][0]["points"][0]["length"] = [[1.0, math.inf]] * 3


def shapes_differ(given: dict[str, Any]) -> None:
    given["cells"][0]["points"][0]["length"] = [[1.0]] * 3


def too_few_prompts(given: dict[str, Any]) -> None:
    given["prompt_sets"][0]["prompts"].append("one more")


def undeclared_scorer(given: dict[str, Any]) -> None:
    given["scorers"].pop()


def steps_repeat(given: dict[str, Any]) -> None:
    given["cells"][0]["points"][1]["step"] = 20


def step_zero_in_a_cell(given: dict[str, Any]) -> None:
    given["cells"][0]["points"][0]["step"] = 0


def same_label(given: dict[str, Any]) -> None:
    given["cells"][1]["label"] = given["cells"][0]["label"]


def no_reason(given: dict[str, Any]) -> None:
    given["cells"][-1]["reason"] = ""


def reply_out_of_range(given: dict[str, Any]) -> None:
    given["reference"][0]["replies"][0]["sample"] = 2


def no_reference(given: dict[str, Any]) -> None:
    given["reference"].pop()


def verdicts_without_a_judge(given: dict[str, Any]) -> None:
    judged(given).pop("judge")


def a_point_without_verdicts(given: dict[str, Any]) -> None:
    judged(given)["reference"][1].pop("verdicts")


def half_a_baseline(given: dict[str, Any]) -> None:
    against_another(given)["baseline"]["points"].pop()


def a_cell_called_baseline(given: dict[str, Any]) -> None:
    against_another(given)["cells"][0]["id"] = "(baseline)"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (ragged, "same number of samples"),
        (infinite, "infinite"),
        (shapes_differ, "differ in shape"),
        (too_few_prompts, "reference, shop, step 0: 3 prompts, the set has 4"),
        (undeclared_scorer, r"scores are \['audit2', 'oracle'\], the comparison declares \['oracle'\]"),
        (steps_repeat, r"steps \[20, 20, 100\] must ascend"),
        (step_zero_in_a_cell, "must ascend from above 0"),
        (same_label, "label: dpo, off more than once"),
        (no_reason, "'ppo' is skipped: say why"),
        (reply_out_of_range, r"reply \[0\]\[2\] is outside \[3, 2\]"),
        (verdicts_without_a_judge, "reference, shop, step 0: verdicts are there exactly where"),
        (a_point_without_verdicts, "reference, travel, step 0: verdicts are there exactly where"),
        (half_a_baseline, r"baseline: one point per prompt set, in the order \['shop', 'travel'\]"),
        (a_cell_called_baseline, r"id: \(baseline\) more than once"),
        (no_reference, r"one point per prompt set, in the order \['shop', 'travel'\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(spoil: Any, message: str) -> None:
    given = small()
    spoil(given)
    with pytest.raises(ValidationError, match=message):
        ComparisonRecord.model_validate(given)


def test_loading_names_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no comparison.json")):
        load_comparison(tmp_path)
    path = save_comparison(make_comparison(num_prompts=3), tmp_path)
    path.write_text(path.read_text().replace('"seed":7', '"seed":"seven"'))
    with pytest.raises(UserError, match=re.escape(f"{path}: sampling.seed: ")):
        load_comparison(tmp_path)
