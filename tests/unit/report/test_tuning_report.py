"""What the report says about trials: all of them, what was picked, what failed, or that nothing was tuned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic_comparison import few_cells

from rayalign.report.points import ComparisonRecord
from rayalign.report.render import render_report

PICKED = {"label": "optim.lr=1e-06", "values": {"optim.lr": "1e-06"}, "status": "done", "step": 100,
          "score": 0.71, "kl": 2.5, "cost": {"tokens_trained": 1000, "device_seconds": 3.0}}  # fmt: skip
DRIFTED = PICKED | {"label": "optim.lr=1e-05", "values": {"optim.lr": "1e-05"}, "score": 0.9, "kl": 30.0,
                    "reason": "its KL of 30 nats per reply is above tune.max_kl 20"}  # fmt: skip
FAILED = {"label": "optim.lr=<1>", "values": {"optim.lr": "<1>"}, "status": "failed", "reason": "the loss became NaN"}


def tuned() -> dict[str, Any]:
    given = few_cells()
    common = {"asked": 6, "seeds": [1000], "scorer": "oracle", "prompt_set": "shop", "num_prompts": 3, "max_kl": 20}
    off, on = given["cells"][:2]
    given["tuning"] = [
        common | {"label": off["label"], "cells": [off["id"]], "trials": [DRIFTED, PICKED, FAILED], "picked": 1},
        common
        | {
            "label": on["label"],
            "cells": [on["id"]],
            "left_out": [{"what": "method.beta", "reason": "ipo has no beta"}],
        },
    ]
    return given


def sections(text: str, mark: str) -> str:
    """The part of the page about tuning."""
    return text[text.index(mark) :].partition("<h2>Training" if mark.startswith("<") else "\n## Training")[0]


def test_trials_stand_in_page_text_and_results(tmp_path: Path) -> None:
    page = render_report(ComparisonRecord.model_validate(tuned()), tmp_path)
    results = json.loads(page.with_name("results.json").read_text())
    first, second = results["tuning"]
    assert (first["picked"], first["trials"][1]["score"], first["trials"][1]["cost"]["tokens_trained"]) == (
        1,
        0.71,
        1000,
    )
    assert "device_seconds" not in first["trials"][1]["cost"]
    assert (second["trials"], second["picked"]) == ([], None)
    html, markdown = sections(page.read_text(), '<section id="tuning">'), page.with_name("report.md").read_text()
    assert "above tune.max_kl 20" in html and "failed: the loss became NaN" in html
    for text in (html, sections(markdown, "## Tuning")):
        assert "untuned" in text and "ipo has no beta" in text and "at most 20 nats" in text
        assert "<1>" not in text
    assert "&lt;1&gt;" in html
    assert "<code>optim.lr: 1e-06</code>" in html
    assert "| `optim.lr: 1e-06` | 0.710 | 2.50 |" in markdown and "*Every trial*: in [report.html]" in markdown
    assert "Settings were picked by oracle on the select half of shop" in markdown
    assert "Configurations had different numbers of trials" in markdown
    for table in re.findall(r'<table class="sortable">.*?</table>', html, flags=re.DOTALL):
        head, body = table.split("</thead>")
        for row in re.findall(r"<tr>.*?</tr>", body, flags=re.DOTALL):
            assert len(re.findall(r'<t[hd][^>]* data-value="', row)) == head.count("aria-sort")


def test_without_trials_the_report_says_untuned(tmp_path: Path) -> None:
    page = render_report(ComparisonRecord.model_validate(few_cells()), tmp_path)
    assert json.loads(page.with_name("results.json").read_text())["tuning"] == []
    for text in (page.read_text(), page.with_name("report.md").read_text()):
        assert "Untuned: every configuration ran with the settings that its YAML gives it" in text


def test_only_a_trial_can_be_picked() -> None:
    given = tuned()
    given["tuning"][1]["picked"] = 0
    with pytest.raises(ValidationError, match="picked 0 of 0 trials"):
        ComparisonRecord.model_validate(given)
