"""The exact experiments' page is that of its results, and says of every claim what the seeds say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from lab.exact.__main__ import main
from lab.exact.e1 import EXPERIMENT as E1
from lab.exact.page import EXPERIMENTS, PAGE, RESULTS, Run, load, page, write
from lab.exact.record import Claim, Judged, Measured, Point, ahead, as_json, claims_table, from_json, judged, number

FOLDER = Path(__file__).parents[3] / "examples" / "lab" / "exact"
MAX_FIGURE_BYTES = 60_000


def measured(cell: str, *values: float) -> Measured:
    return Measured(points=tuple(Point(cell=cell, at=at, values={"KL": value}) for at, value in enumerate(values)))


def test_a_value_is_found_once() -> None:
    seed = Measured(points=(*measured("one", 1.0, 2.5).points, *measured("other", 0.5).points))
    assert seed.value("one", "KL", 1) == 2.5
    assert ahead("one", "other", "KL", 0)(seed) == 0.5
    with pytest.raises(LookupError):
        seed.value("one", "KL", 7)
    with pytest.raises(LookupError):
        seed.value("one", "E[r]", 0)


def test_points_survive_the_file_to_nine_digits() -> None:
    found = from_json(as_json(measured("one", 1 / 3, 1e-12).points))
    assert found == measured("one", 0.333333333, 1e-12)


def test_numbers_are_short() -> None:
    assert [number(value, 3) for value in (1 / 3, -0.0, -1e-9, math.nan)] == ["0.333", "0.000", "-1e-09", "–"]


def test_a_claims_row_by_hand() -> None:
    claim = Claim(text="it grows", value=lambda seed: seed.value("one", "KL", 0), above=0.5)
    rows = claims_table([Judged(claim=claim, values=(1.0, 2.0, 3.0))], (20, 21, 22))
    assert rows.splitlines()[-1] == "| it grows | 0.500 | 1.000 | 2.000 | 3.000 | 2.000 [-0.484, 4.484] | not shown |"
    assert Judged(claim=claim, values=(2.0, 2.1, 2.2)).verdict == "holds"
    assert Judged(claim=claim, values=(0.0, 0.1, 0.2)).verdict == "contradicted"
    assert Judged(claim=claim, values=(2.0, math.nan, 2.2)).verdict == "not shown"


def test_the_page_is_that_of_its_results() -> None:
    runs = load(FOLDER / RESULTS)
    assert list(runs) == list(EXPERIMENTS)
    assert {tuple(run.seeds) for run in runs.values()} == {(10, 11, 12, 13, 14)}
    assert (FOLDER / PAGE).read_text(encoding="utf-8") == page(runs)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_claim_is_about_what_is_measured(name: str) -> None:
    """Nothing stays open but what a seed did not reach."""
    experiment, run = EXPERIMENTS[name], load(FOLDER / RESULTS)[name]
    texts = [claim.text for claim in experiment.claims]
    assert len(set(texts)) == len(texts)
    found = judged(experiment, list(run.seeds.values()))
    unknown = [one.claim.text for one in found if any(math.isnan(value) for value in one.values)]
    assert [text for text in unknown if "at a KL of" not in text] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_figures_are_small(name: str) -> None:
    assert 5_000 < (FOLDER / f"{name}.svg").stat().st_size < MAX_FIGURE_BYTES


def test_experiments_that_are_not_run_again_stay(tmp_path: Path) -> None:
    runs = load(FOLDER / RESULTS)
    write(tmp_path, {"e8": runs["e8"]})
    write(tmp_path, {"e1": Run(seeds={20: runs["e1"].seeds[10]}, seconds=3.0)})
    assert list(load(tmp_path / RESULTS)) == ["e1", "e8"]
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert f"| [E1](#e1-exo-seeks-a-mode-dpo-on-rewards-covers) {E1.title} | 0 | {len(E1.claims)} | 0 | 3 |" in text
    assert {file.name for file in tmp_path.iterdir()} == {RESULTS, PAGE, "e1.svg", "e8.svg"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lab.exact", *arguments])
    main()


def test_an_experiment_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "e8", "e9")
    assert end.value.code == 2
    assert "no experiment is called e9; there are e1, e2, e3, e4, e4b, e6, e7, e8" in capsys.readouterr().err


def test_other_seeds_have_a_page_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (FOLDER / RESULTS).read_bytes()
    threads = torch.get_num_threads()
    run(monkeypatch, "e8", "--seeds", "20")
    torch.set_num_threads(threads)
    text = (tmp_path / "runs" / "lab-exact" / PAGE).read_text(encoding="utf-8")
    experiment = EXPERIMENTS["e8"]
    assert experiment.reading not in text and experiment.reading in (FOLDER / PAGE).read_text(encoding="utf-8")
    assert claims_table(judged(experiment, [Measured(points=experiment.measure(20))]), (20,)) in capsys.readouterr().out
    assert text.count("| not shown |") == 1 + len(experiment.claims)  # one seed shows nothing; and the summary's head
    assert (FOLDER / RESULTS).read_bytes() == before
