"""Figures: stable bytes, every cell told apart, nothing that reaches outside."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from synthetic_comparison import comparison_input, few_cells, make_comparison

from rayalign.report.entries import entries_of
from rayalign.report.estimates import summarize
from rayalign.report.figures import draw_all, entry_styles, trailing_mean
from rayalign.report.points import ComparisonRecord
from rayalign.report.statistics import Bootstrap
from rayalign.report.svg import THEME, inline, standalone


def drawn(comparison: ComparisonRecord) -> dict[str, str]:
    return draw_all(comparison, summarize(comparison, Bootstrap(resamples=20)))


@pytest.fixture(scope="module")
def drawings() -> dict[str, str]:
    return drawn(make_comparison(num_prompts=4))


def texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")
    ]


def test_equal_input_gives_equal_bytes() -> None:
    assert drawn(ComparisonRecord.model_validate(few_cells())) == drawn(ComparisonRecord.model_validate(few_cells()))


def test_there_is_a_frontier_per_scorer_and_a_curve_per_metric(drawings: dict[str, str]) -> None:
    assert list(drawings) == [
        "frontier-oracle",
        "frontier-audit2",
        *(f"cost-{axis}-{scorer}" for axis in ("tokens", "supervision", "seconds") for scorer in ("oracle", "audit2")),
        "length",
        "curve-loss",
        "curve-rewards-accuracies",
        "curve-rewards-margins",
    ]


def test_the_frontier_names_cells_axes_and_reference(drawings: dict[str, str]) -> None:
    found = texts(drawings["frontier-audit2"])
    cells = [cell for cell in make_comparison(num_prompts=4).cells if cell.points]
    for cell in cells:
        assert cell.label + (" (failed)" if cell.status == "failed" else "") in found
    assert {"reference", "audit2, mean over prompts"} <= set(found)
    assert "KL(π‖π_ref), k1, nats per reply (logarithmic above 1)" in found


def test_the_frontier_has_the_references_best_of_n_where_it_was_sampled_twice() -> None:
    assert "reference, best of n" in texts(drawn(ComparisonRecord.model_validate(few_cells()))["frontier-oracle"])
    once = drawn(ComparisonRecord.model_validate(few_cells(num_samples=1)))["frontier-oracle"]
    assert "reference, best of n" not in texts(once)


def test_a_small_kl_keeps_a_linear_axis() -> None:
    given = few_cells()
    found = texts(drawn(ComparisonRecord.model_validate(given))["frontier-oracle"])
    assert "KL(π‖π_ref), k1, nats per reply" in found


def test_twelve_cells_are_told_apart_without_colour() -> None:
    look = entry_styles(entries_of(make_comparison(num_prompts=4).cells))
    assert len({(style.symbol, style.line) for style in look.values()}) == 12
    assert look["dpo-off_policy"].color == look["dpo-on_policy"].color
    assert look["dpo-off_policy"].line != look["dpo-on_policy"].line


def test_cells_that_differ_in_neither_method_nor_policy_get_their_own_look() -> None:
    given = comparison_input(num_prompts=4)
    given["cells"][1]["data_policy"] = "off_policy"
    look = entry_styles(entries_of(ComparisonRecord.model_validate(given).cells))
    assert len({(style.symbol, style.color, style.line) for style in look.values()}) == 12


def test_ids_are_unique_to_a_figure_and_references_resolve(drawings: dict[str, str]) -> None:
    ids = {stem: set(re.findall(r'\bid="([^"]+)"', svg)) for stem, svg in drawings.items()}
    assert len(set.union(*ids.values())) == sum(len(found) for found in ids.values())
    for stem, svg in drawings.items():
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in used} <= ids[stem]


def test_every_colour_follows_the_page(drawings: dict[str, str]) -> None:
    for svg in drawings.values():
        fallbacks = set(re.findall(r"var\(--\w+, (#\w{6})\)", svg))
        assert fallbacks <= {light for light, _ in THEME.values()}
        assert not re.findall(r"(?:fill|stroke): #", svg)


def test_the_file_stands_alone_and_the_inline_form_names_no_url(drawings: dict[str, str]) -> None:
    for svg in drawings.values():
        assert ElementTree.fromstring(standalone(svg)).tag == "{http://www.w3.org/2000/svg}svg"
        assert "http" not in inline(svg)
        assert 'viewBox="' in inline(svg)


def test_nothing_was_evaluated() -> None:
    given = few_cells()
    given["cells"] = given["cells"][-1:]
    found = drawn(ComparisonRecord.model_validate(given))
    assert list(found) == ["frontier-oracle", "frontier-audit2", "length"]
    assert "reference" in texts(found["length"])


def test_labels_are_text_and_not_markup() -> None:
    given = few_cells()
    given["scorers"][0]["label"] = '"><b> $x^'
    svg = drawn(ComparisonRecord.model_validate(given))["frontier-oracle"]
    assert '"><b> $x^, mean over prompts' in texts(svg)
    assert "<b>" not in svg


def test_trailing_mean_by_hand() -> None:
    assert trailing_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert trailing_mean([1.0, 3.0], 1) == [1.0, 3.0]
