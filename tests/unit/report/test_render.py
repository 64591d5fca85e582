"""The report as files: inert text, no network, stable numbers, and the words that keep its claims honest."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_comparison import against_another, few_cells, judged, make_comparison

from rayalign.report.estimates import summarize
from rayalign.report.points import ComparisonRecord, load_comparison, save_comparison
from rayalign.report.render import comparison_limits, render_report
from rayalign.report.results_json import results_json

HEAD = "interval over prompts, one training run"


class Page(HTMLParser):
    """Tags with their attributes, the text of scripts, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts.append(data)
        elif self.open != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(make_comparison(num_prompts=6), tmp_path_factory.mktemp("compared")).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_all_files_are_there_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "report.md",
        "results.json",
        "frontier-oracle.svg",
        "frontier-audit2.svg",
        *(
            f"cost-{axis}-{scorer}.svg"
            for axis in ("tokens", "supervision", "seconds")
            for scorer in ("oracle", "audit2")
        ),
        "length.svg",
        "curve-loss.svg",
        "curve-rewards-accuracies.svg",
        "curve-rewards-margins.svg",
    }


def test_the_page_needs_no_network(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    assert not re.search(r"https?:|(?:src|href)=[\"'](?!#)|@import|url\((?!#)|<link|<iframe|<img", html)


def test_the_policy_allows_the_one_script_and_nothing_else(page: Page) -> None:
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_markup_in_any_text_is_inert(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`|"

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        poisoned = {"text", "label", "title", "opening", "caveats", "description", "prompts", "reason", "display_name"}
        poisoned |= {"base", "value", "commands", "unit", "git_revision", "CPU", "torch", "finished"}
        return value + hostile if isinstance(value, str) and key in poisoned else value

    report = render_report(ComparisonRecord.model_validate(poison(few_cells())), tmp_path)
    page = Page(report.read_text())
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not page.all("img")
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert page.text.count("alert(1)") > 50
    markdown = report.with_name("report.md").read_text()
    live = [line for line in markdown.splitlines() if "<script>" in line and not line.startswith("    ")]
    assert live == []


def test_the_opening_stands_before_every_number(page: Page) -> None:
    opening = "This world was built so that most stored pairs teach a lesson that is wrong for most prompts."
    assert page.text.index(opening) < page.text.index("At a glance\nEvery cell")
    assert page.text.index("does not rank") < page.text.index(HEAD.replace("interval", "[interval"))


def test_every_table_of_estimates_carries_the_head(folder: Path, page: Page) -> None:
    html = (folder / "report.html").read_text()
    assert html.count(f"[{HEAD}]</th>") == 6  # at a glance, best of n and every checkpoint, for two prompt sets
    assert HEAD in (folder / "report.md").read_text()
    assert "calls no cell better than another" in page.text
    assert not re.search(r"\b(significant|best(?! of n)|winner|outperforms)\b", page.text)


def test_numbers_of_a_row_are_those_of_results_json(folder: Path, page: Page) -> None:
    results = json.loads((folder / "results.json").read_text())
    (point,) = [
        point
        for point in results["points"]
        if (point["cell"], point["prompt_set"], point["step"]) == ("rloo-on_policy", "shop", 100)
    ]
    oracle = point["scores"]["oracle"]
    assert f"{oracle['mean']:.3f}[{oracle['low']:.3f}, {oracle['high']:.3f}]" in page.text
    assert oracle["n"] == 6 and point["num_samples"] == 2
    assert results["interval"]["head"] == HEAD


def test_undone_cells_and_levels_not_reached_are_shown(page: Page) -> None:
    assert "stored groups carry no behavior log-probs, which ppo needs" in page.text
    assert "the loss became NaN at step 61" in page.text
    assert "not reached" in page.text
    assert "10 of 12 cells done" in page.text
    assert "Recipes were adjusted on seed 0 only" in page.text


def test_a_cell_that_the_budget_stopped_is_shown_with_its_numbers_and_where_it_was(tmp_path: Path) -> None:
    whole = make_comparison(num_prompts=6)
    stopped = whole.cells[0].model_copy(
        update={"status": "stopped", "reason": "stopped at step 40 of 100: budget", "entry": ""}
    )
    folder = render_report(whole.model_copy(update={"cells": (stopped, *whole.cells[1:])}), tmp_path).parent
    page = Page((folder / "report.html").read_text())
    assert f"{stopped.label} (stopped)" in " ".join(page.text.split())
    assert "stopped at step 40 of 100: budget" in page.text
    assert "| stopped | stopped at step 40 of 100: budget |" in (folder / "report.md").read_text()
    found = json.loads((folder / "results.json").read_text())
    assert [cell["status"] for cell in found["cells"] if cell["id"] == stopped.id] == ["stopped"]
    assert [point for point in found["points"] if point["cell"] == stopped.id]


def test_tables_can_be_sorted(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    tables = re.findall(r'<table class="sortable">.*?</table>', html, flags=re.DOTALL)
    assert len(tables) == 9
    for table in tables:
        head, body = table.split("</thead>")
        columns = re.findall(r'<th scope="col"( class="num")? aria-sort="none"><button type="button">', head)
        for row in re.findall(r"<tr>.*?</tr>", body, flags=re.DOTALL):
            values = re.findall(r'<t[hd][^>]* data-value="([^"]*)"', row)
            assert len(values) == len(columns)
            numbers = [float(value) for value, numeric in zip(values, columns, strict=True) if numeric]
            assert len(numbers) == sum(map(bool, columns))


def results_of(given: dict[str, Any]) -> str:
    comparison = ComparisonRecord.model_validate(given)
    return results_json(comparison, summarize(comparison))


def test_results_are_stable_bytes_apart_from_times_and_provenance() -> None:
    given = few_cells()
    first = results_of(given)
    assert results_of(few_cells()) == first

    given["provenance"] = {"git_revision": "another", "finished": "2027-01-01T00:00:00+00:00"}
    given["cells"][0]["cost"]["device_seconds"] = 99.0
    one, other = json.loads(first), json.loads(results_of(given))
    assert {key for key in one if one[key] != other[key]} == {"times", "provenance"}


def test_the_report_comes_back_from_the_saved_points(tmp_path: Path) -> None:
    comparison = ComparisonRecord.model_validate(few_cells())
    first = render_report(comparison, tmp_path / "a").parent
    save_comparison(comparison, tmp_path / "b")
    again = render_report(load_comparison(tmp_path / "b"), tmp_path / "b").parent
    for path in first.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_a_filter_kept_stands_in_page_text_and_results(tmp_path: Path) -> None:
    given = few_cells()
    given["cells"][0]["filter"] = {
        "policy_logp_quantile": 0.7, "threshold": -1.234, "kept": 694, "of": 2312, "unit": "pairs"
    }  # fmt: skip
    report = render_report(ComparisonRecord.model_validate(given), tmp_path)
    sentence = "kept 694 of 2,312 pairs, threshold −1.23 nats per token"
    page = Page(report.read_text())
    assert page.text.count(sentence) == 1
    said = "was trained on the stored data that the initial policy is likeliest to write"
    assert f"\ndpo, off {said}: {sentence}.\n" in report.with_name("report.md").read_text()
    cells = json.loads(report.with_name("results.json").read_text())["cells"]
    assert [cell["filter"] for cell in cells] == [given["cells"][0]["filter"], None, None, None]


def test_markdown_tables_are_rectangular(folder: Path) -> None:
    widths: dict[int, set[int]] = {}
    block = 0
    for line in (folder / "report.md").read_text().splitlines():
        if line.startswith("|"):
            widths.setdefault(block, set()).add(line.count("|"))
        else:
            block += 1
    assert len(widths) == 9  # two of everybody against everybody
    assert all(len(found) == 1 for found in widths.values())


def test_samples_put_the_reference_first(page: Page) -> None:
    samples = page.text[page.text.index("Samples\nThe same prompt") :]
    assert samples.index("(reference)") < samples.index("(dpo-off_policy)") < samples.index("(rloo-on_policy)")
    assert "sampling seed (7)" in samples


def test_another_sampling_temperature_is_not_called_the_policy() -> None:
    given = few_cells()
    given["sampling"]["temperature"] = 0.7
    comparison = ComparisonRecord.model_validate(given)
    words = " ".join(comparison_limits(comparison, summarize(comparison)))
    assert "temperature 0.7, top-p 1, which is not the policy itself: the number is not its KL" in words


def test_missing_values_and_single_prompts_are_shown_as_missing(tmp_path: Path) -> None:
    given = few_cells(num_prompts=1, num_samples=1)
    for point in (*given["reference"], *(point for cell in given["cells"] for point in cell["points"])):
        point["replies"] = point["replies"][:1]
    for point in given["cells"][0]["points"]:
        point["scores"]["audit2"] = [[None]]
    report = render_report(ComparisonRecord.model_validate(given), tmp_path)
    results = json.loads(report.with_name("results.json").read_text())
    (point,) = [
        p for p in results["points"] if (p["cell"], p["prompt_set"], p["step"]) == ("dpo-off_policy", "shop", 20)
    ]
    assert point["scores"]["audit2"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert point["scores"]["oracle"]["low"] is None
    assert "–– n = 0" in Page(report.read_text()).text
    assert not re.search(r"\bnan\b", Page(report.read_text()).text)


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_judge_has_a_column_a_row_of_costs_and_its_limits(tmp_path: Path) -> None:
    report = render_report(ComparisonRecord.model_validate(judged(few_cells())), tmp_path)
    text, markdown = Page(report.read_text()).text, report.with_name("report.md").read_text()
    results = json.loads(report.with_name("results.json").read_text())
    (point,) = [
        p for p in results["points"] if (p["cell"], p["prompt_set"], p["step"]) == ("dpo-off_policy", "shop", 100)
    ]
    rate = point["judged"]
    assert results["schema"] == "rayalign.results/4" and results["baseline"] == "reference"
    assert [judge["name"] for judge in results["measures"]["judge"]] == ["careful"]
    assert f"{rate['mean']:.3f}[{rate['low']:.3f}, {rate['high']:.3f}]" in text
    assert text.count("win ratejudged by careful") == 4
    head, _, *rows = [line for line in markdown.splitlines() if line.startswith("|")]
    shown = dict(zip(cells_of(head), cells_of(rows[1]), strict=True))
    assert shown["win rate (judged by careful)"].startswith(f"{rate['mean']:.3f} [{rate['low']:.3f}, ")
    assert (
        dict(zip(cells_of(head), cells_of(rows[0]), strict=True))["win rate (judged by careful)"] == "0.5 by definition"
    )

    asked = [row for row in results["answers"] if row["cell"] == "dpo-off_policy"]
    assert asked[0]["calls"] == 132 and asked[0]["missing"] == 6
    assert "| dpo, off | judge careful | 48 | 132 | 48 | 12 | 6 | 6 |" in markdown
    assert "Asked in the evaluation" in text and "judge careful" in text
    for words in (text, markdown):
        assert "Sees both replies in both orders." in words
        assert "The judge careful gave no answer for 13 of 104 replies" in words
        assert "The first: careful at http://here gave no verdict in 4 attempts" in words
        assert "The win rate judged by careful compares each reply with the one of the reference to the same" in words
    # Of first samples: the reference ties with itself, and of the first prompt a verdict is missing.
    assert "judged by careful: tie" in text and "judged by careful: –" in text


def test_without_a_judge_nothing_is_said_of_one(folder: Path, page: Page) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert results["answers"] == [] and results["measures"]["judge"] == []
    assert {point["judged"] for point in results["points"]} == {None}
    for text in (page.text, (folder / "report.md").read_text()):
        assert "judge" not in text and "Asked in the evaluation" not in text


def test_another_baseline_stands_in_the_tables_and_is_what_wins_are_against(tmp_path: Path) -> None:
    report = render_report(ComparisonRecord.model_validate(against_another(few_cells())), tmp_path)
    page, markdown = Page(report.read_text()), report.with_name("report.md").read_text()
    assert "pairings with last year's that the cell wins" in page.text
    head, _, reference, baseline, *_ = [line for line in markdown.splitlines() if line.startswith("|")]
    names = cells_of(head)
    assert "0.5 by definition" not in reference
    assert cells_of(baseline)[0] == "last year's (baseline)"
    assert cells_of(baseline)[names.index("win rate (under oracle)")] == "0.5 by definition"
    assert page.text.count("0.5by definition") == 16  # two scorers, two rates, two prompt sets, two tables
    assert json.loads(report.with_name("results.json").read_text())["baseline"] == "last year's"
    samples = page.text[page.text.index("Samples\nThe same prompt") :]
    assert samples.index("(reference)") < samples.index("(last year's)") < samples.index("(dpo-off_policy)")


def test_a_judged_comparison_comes_back_from_its_file(tmp_path: Path) -> None:
    comparison = ComparisonRecord.model_validate(against_another(few_cells()))
    save_comparison(comparison, tmp_path)
    assert load_comparison(tmp_path) == comparison
    judged_one = ComparisonRecord.model_validate(judged(few_cells()))
    save_comparison(judged_one, tmp_path)
    assert load_comparison(tmp_path) == judged_one


def test_a_cell_may_be_called_baseline(tmp_path: Path) -> None:
    given = few_cells()
    given["cells"][0] |= {"id": "baseline", "label": "baseline"}
    page = Page(render_report(ComparisonRecord.model_validate(given), tmp_path).read_text())
    assert "(baseline)" not in page.text and page.text.count("0.5by definition") == 16
