"""A comparison of filtered cells from one YAML: what each trained on, which stages they share, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import save_tiny
from workspaces import Finished, Workspace, rayalign

from rayalign.config.compare import load_compare
from rayalign.data.select import read_selected_rows, rows_file, scores_of
from rayalign.data.store import TokenStore
from rayalign.rounds.streams import StoredStream
from rayalign.run.job import make_job
from rayalign.run.reference import LOG_PROBS
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEPT = {"policy_logp_quantile": 0.7}
METHODS: list[dict[str, Any]] = [
    {"name": "dpo"},
    {"name": "dpo", "filter": KEPT},
    {"name": "kto", "filter": KEPT},
    {"name": "simpo", "filter": KEPT},
    {"name": "dpo", "filter": KEPT, "data_policy": {"name": "hybrid", "refresh_every": 1}, "as": "hybrid"},
    {"name": "dpo", "filter": KEPT, "data_policy": "on_policy", "as": "fresh"},
]


@pytest.fixture(scope="module")
def printed(workspace: Workspace, session: Session) -> str:
    folder = workspace.folder
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "near.jsonl").write_text("".join(lines[:24]))
    (folder / "far.jsonl").write_text("".join(lines[24:40]))
    (folder / "held_out.jsonl").write_text("".join(lines[40:50]))
    (folder / "vowels.py").write_text("def vowels(prompt, reply):\n    return sum(c in 'aeiou' for c in reply)\n")
    scorer = {"name": "rule", "function": "vowels:vowels"}
    data = {"train": ["near.jsonl", "far.jsonl"], "eval": ["held_out.jsonl"]}
    comparison = {
        "name": "filters",
        "base": {
            "storage_path": str(workspace.storage),
            "model": {"name": "model"},
            "data": {**data, "max_prompt_tokens": 48, "max_tokens": 96},
            "method": {"name": "dpo"},
            "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 6},
            "scorer": scorer,
            "optim": {"lr": 1e-3, "epochs": 1, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
            "evaluate": {
                "prompts": ["held_out.jsonl"],
                "scorers": [scorer],
                "sampling": {"samples": 1, "max_new_tokens": 6},
            },
            "track": [],
        },
        "grid": {"method": METHODS},
    }
    path = folder / "filters.yaml"
    path.write_text(yaml.safe_dump(comparison, sort_keys=False))
    done: Finished = rayalign("compare", path)
    assert done.code == 0, done.printed
    return done.printed


def cell(workspace: Workspace, name: str) -> dict[str, Any]:
    record = json.loads((workspace.storage / "filters" / "comparison.json").read_text())
    (found,) = [cell for cell in record["cells"] if cell["id"] == name]
    return dict(found)


def run_json(workspace: Workspace, name: str) -> dict[str, Any]:
    return dict(json.loads((workspace.storage / "filters" / "cells" / name / "run.json").read_text()))


def likeliest(workspace: Workspace, data: list[dict[str, Any]], own: int | None) -> list[list[int]]:
    """The rows that should be kept of every store, from the reference log-probs in the artifacts."""
    artifacts = workspace.storage / "artifacts"
    scores = []
    for facts in data:
        store = TokenStore.open(facts["store"])
        (columns,) = [
            path
            for path in artifacts.glob("reference-*")
            if json.loads((path / "MANIFEST.json").read_text())["store"] == store.digest
        ]
        scores.append(scores_of(store.with_columns(columns), column=LOG_PROBS, own_candidates=own).tolist())
    ranked = sorted((value for values in scores for value in values), reverse=True)
    lowest = ranked[-(-3 * len(ranked) // 10) - 1]
    return [[row for row, value in enumerate(values) if value >= lowest] for values in scores]


@pytest.mark.parametrize(
    ("name", "unit", "of", "kept", "own"),
    [
        ("dpo-filter-0.7", "pairs", 40, 12, None),
        ("kto-filter-0.7", "examples", 80, 24, 1),
        ("simpo-filter-0.7", "pairs", 40, 12, None),
        ("hybrid", "pairs", 40, 12, None),
    ],
)
def test_a_cell_trains_on_the_likeliest_of_both_files(
    printed: str, workspace: Workspace, name: str, unit: str, of: int, kept: int, own: int | None
) -> None:
    facts = run_json(workspace, name)
    data = [store for store in facts["data"] if "kept" in store]
    assert len(data) == 2 and sum(store["kept"] for store in data) == kept
    assert {store["filter"]["of"] for store in data} == {of} and data[0]["filter"]["unit"] == unit
    assert [len(rows) for rows in likeliest(workspace, data, own)] == [store["kept"] for store in data]
    assert facts["steps"] == kept // 4  # an epoch is one of what is kept
    found = cell(workspace, name)
    threshold = data[0]["filter"]["threshold"]
    assert found["filter"] == {**KEPT, "threshold": threshold, "kept": kept, "of": of, "unit": unit}
    assert f"filter: kept {kept} of {of} {unit}, threshold −" in printed
    if name != "hybrid":
        assert found["cost"]["labels_used"] == kept


def test_cells_share_their_filter_and_the_log_probs_beneath_it(printed: str, workspace: Workspace) -> None:
    """Two files of pairs, two of KTO's examples, and one held out in each form; the policy is its own reference."""
    stages = sorted(path.name.partition("-")[0] for path in (workspace.storage / "artifacts").glob("*-*"))
    assert stages.count("filter") == 2 and stages.count("reference") == 6
    kept = [
        [read_selected_rows(rows_file(path, number)).tolist() for number in (0, 1)]
        for path in (workspace.storage / "artifacts").glob("filter-*")
    ]
    pairs = [store for store in run_json(workspace, "dpo-filter-0.7")["data"] if "kept" in store]
    assert likeliest(workspace, pairs, None) in kept


def test_the_unfiltered_cell_and_held_out_pairs_are_whole(
    printed: str, workspace: Workspace, session: Session, tmp_path: Path
) -> None:
    (run,) = [c.run for c in load_compare(workspace.folder / "filters.yaml").cells if c.id == "dpo-filter-0.7"]
    assert run is not None
    stages = Stages(artifacts=Artifacts(root=workspace.storage / "artifacts"), session=session)
    job = make_job(run, tmp_path, stages, processes=1, label="dpo")
    (trained,), (held_out,) = job.source.streams, job.held_out.streams if job.held_out else ()
    assert isinstance(trained, StoredStream) and len(trained.kept) == 2
    assert isinstance(held_out, StoredStream) and (held_out.kept, held_out.groups_per_step) == ((), 10)
    assert run_json(workspace, "dpo")["steps"] == 10 and cell(workspace, "dpo")["filter"] is None
    for name in ("dpo", "dpo-filter-0.7"):
        rows = (workspace.storage / "filters" / "cells" / name / "metrics.jsonl").read_text().splitlines()
        assert any(key.startswith("eval") for key in json.loads(rows[-1]))


def test_a_cell_without_stored_pairs_is_skipped_with_the_reason(printed: str, workspace: Workspace) -> None:
    assert cell(workspace, "fresh")["status"] == "skipped"
    assert "filter: on_policy has no stored pairs to choose from" in cell(workspace, "fresh")["reason"]


def test_the_report_says_what_was_kept(printed: str, workspace: Workspace) -> None:
    text = (workspace.storage / "filters" / "report" / "report.md").read_text()
    assert text.count(": kept 12 of 40 pairs, threshold −") == 3 and ": kept 24 of 80 examples" in text


def test_another_reference_is_no_measure_of_the_policy(printed: str, workspace: Workspace, tmp_path: Path) -> None:
    """The filter scores by the policy, the loss by its reference: two sets of log-probs, and the same pairs kept."""
    save_tiny(tmp_path / "other", max_position_embeddings=256, initializer_range=0.1)
    data = {"train": ["near.jsonl", "far.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96}
    path = workspace.run(
        "other-reference",
        data=data,
        model={"name": "model", "reference": str(tmp_path / "other")},
        filter=KEPT,
        optim={"lr": 1e-3, "steps": 2, "groups_per_step": 4, "tokens_per_micro_batch": 2048},
    )
    first = rayalign("train", path)
    assert first.code == 0, first.printed
    assert first.printed.count("reference: making") == 2 and first.printed.count("reference: found") == 2
    assert "filter: found" in first.printed and "filter: kept 12 of 40 pairs" in first.printed
    refused = rayalign("train", path, "filter.policy_logp_quantile=0.5")
    assert refused.code == 2 and "filter.policy_logp_quantile: 0.7 there, 0.5 here" in refused.printed
