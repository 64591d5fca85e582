"""What a reader without sight, mouse or script has of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_comparison import few_cells, make_comparison, seeded

from rayalign.report import figures
from rayalign.report.estimates import summarize
from rayalign.report.points import ComparisonRecord
from rayalign.report.render import render_report
from rayalign.report.statistics import Bootstrap
from rayalign.report.svg import THEME


@pytest.fixture(scope="module", params=["single", "seeded"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    given = few_cells() if request.param == "single" else seeded(few_cells(), seeds=2)
    return render_report(ComparisonRecord.model_validate(given), tmp_path_factory.mktemp("page")).read_text()


def test_every_drawing_has_a_title_and_a_description(page: str) -> None:
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) > 8
    for svg in drawings:
        named = re.search(r'role="img" aria-labelledby="(\S+) (\S+)"', svg)
        assert named
        title, words = (re.search(rf'id="{name}">([^<]+)<', svg) for name in named.groups())
        assert title and " against " in title[1]
        assert words and "ends at" in words[1]


def test_every_head_of_a_table_says_what_it_heads(page: str) -> None:
    for head in re.findall(r"<th\b[^>]*>", page):
        assert 'scope="' in head, head
    for table in re.findall(r'<table class="sortable.*?</table>', page, flags=re.DOTALL):
        heads = re.findall(r"<th [^>]*aria-sort[^>]*>(.*?)</th>", table, flags=re.DOTALL)
        assert heads and all(head.startswith('<button type="button">') for head in heads)


def test_nothing_needs_the_script_or_the_network(page: str) -> None:
    assert len(re.findall(r"<script", page)) == 1 and "src=" not in page
    assert not re.findall(r'(?:href|src)="(?!#)', page)
    assert page.count('type="radio"') == 4 and page.count("checked") >= 1


def luminance(color: str) -> float:
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_by_four_and_a_half_and_marks_by_three() -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11, on both pages."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for which, page in enumerate(("#ffffff", "#14171b")):
        for name, colors in THEME.items():
            if name != "rule":
                assert contrast(colors[which], page) >= (4.5 if name in ("ink", "muted") else 3.0), (name, page)


def test_costs_are_axes_where_anything_was_spent() -> None:
    comparison = make_comparison(num_prompts=4)
    summary = summarize(comparison, Bootstrap(resamples=20))
    drawn = figures.draw_all(comparison, summary)
    assert [name for name in drawn if name.startswith("cost-")] == [
        f"cost-{axis}-{scorer}" for axis in ("tokens", "supervision", "seconds") for scorer in ("oracle", "audit2")
    ]
    words = re.search(r"<desc[^>]*>([^<]*)", drawn["cost-tokens-oracle"])
    assert words and "dpo, off ends at 3.1e+05," in words[1]
    free = comparison.model_copy(
        update={"cells": tuple(cell.model_copy(update={"cost": type(cell.cost)()}) for cell in comparison.cells)}
    )
    assert figures.cost_axes(summarize(free, Bootstrap(resamples=20))) == []


def test_a_checkpoint_had_cost_the_share_of_its_step() -> None:
    (entry,) = [
        one
        for one in summarize(make_comparison(num_prompts=4), Bootstrap(resamples=20)).entries
        if one.label == "ipo, off"
    ]
    assert figures.last_entry_step(entry) == 100
    assert [figures.COST_AXES[1].amount(entry.cost) * step / 100 for step in (20, 50, 100)] == [320, 800, 1600]


def test_files_of_drawings_are_whole_by_themselves(tmp_path: Path) -> None:
    report = render_report(ComparisonRecord.model_validate(few_cells()), tmp_path).parent
    names = {path.stem for path in report.glob("*.svg")}
    assert {"frontier-oracle", "cost-seconds-audit2", "length", "curve-loss"} <= names
