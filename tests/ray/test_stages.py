"""The stages before training on a real Ray: what survives a kill, what is shared, what becomes of bad rows."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import BAD_INPUTS, line
from workspaces import Workspace, kill_workers, rayalign, wait_until

from rayalign.config.load import load_run
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.run import reference
from rayalign.run import stages as stages_module
from rayalign.run.model import scoring_spec
from rayalign.run.stages import Stages
from rayalign.runtime import reading
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def stages(workspace: Workspace, session: Session, notes: list[str]) -> Stages:
    return Stages(artifacts=Artifacts(root=workspace.storage / "artifacts", note=notes.append), session=session)


@pytest.fixture(scope="module")
def store(workspace: Workspace, stages: Stages) -> Path:
    run = load_run(workspace.run("stages"))
    return stages.tokens(run.data.train[0], run, "pair")


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.columns")}


def modified(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.columns")}


@pytest.mark.slow
def test_reference_goes_on_after_its_process_was_killed(
    workspace: Workspace, store: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LEAST_GROUPS", 4)
    monkeypatch.setattr(reference, "commit_columns", partial(commit_columns, shard_bytes=1))
    spec = scoring_spec(load_run(workspace.run("stages")), session)
    kept: dict[str, int] = {}

    def kill() -> None:
        wait_until(lambda: len(list(tmp_path.glob("*.shard.json"))) >= 3, "3 shards")
        kill_workers("PoolActor")
        kept.update({path.name.replace(".shard.json", ".columns"): 0 for path in tmp_path.glob("*.shard.json")})
        kept.update({name: time for name, time in modified(tmp_path).items() if name in kept})

    killer = threading.Thread(target=kill)
    killer.start()
    reference.score_store(store, tmp_path, spec, session=session, facts={}, note=lambda line: None)
    killer.join()
    assert 3 <= len(kept) < 50
    assert len(modified(tmp_path)) == 50
    assert {name: time for name, time in modified(tmp_path).items() if name in kept} == kept
    whole = TokenStore.open(store).with_columns(tmp_path)
    assert all(np.isfinite(whole[index].per_token["ref_token_logp"]).all() for index in range(len(whole)))


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_only_missing_shards_are_scored(
    workspace: Workspace, store: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "LEAST_GROUPS", 50)
    spec = scoring_spec(load_run(workspace.run("stages")), session)

    def interrupted(*arguments: object, **more: object) -> None:
        raise Interrupted

    def score() -> None:
        reference.score_store(store, tmp_path, spec, session=session, facts={}, note=lambda line: None)

    monkeypatch.setattr(reference, "commit_columns", interrupted)
    with pytest.raises(Interrupted):
        score()
    before, content = modified(tmp_path), shard_bytes(tmp_path)
    (tmp_path / "0000000050.columns").write_bytes(b"torn")
    (tmp_path / "0000000150.shard.json").unlink()
    monkeypatch.setattr(reference, "commit_columns", partial(commit_columns, shard_bytes=1))
    score()
    after = modified(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"0000000050.columns", "0000000150.columns"}
    assert shard_bytes(tmp_path) == content


def test_preparation_repeats_what_its_dead_process_had_begun_and_nothing_else(
    workspace: Workspace, stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "LEAST_BYTES", 1 << 14)
    rows = (workspace.folder / "pairs.jsonl").read_text().splitlines()
    (workspace.folder / "many.jsonl").write_text("".join(f"{row}\n" for row in rows * 8))
    run = load_run(workspace.run("many", data={"train": ["many.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96}))
    undisturbed = stages.tokens(run.data.train[0], run, "pair")
    others = replace(stages, artifacts=Artifacts(root=tmp_path, note=lambda line: None))
    kept: dict[str, int] = {}

    def kill() -> None:
        wait_until(lambda: len(list(tmp_path.glob("tokens-*/.*.report.json"))) >= 4, "4 reports")
        kill_workers("MapWorker")
        kept.update({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*/.*.report.json")})

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.MonkeyPatch.context() as patch:
        reports: dict[str, int] = {}

        def commit(directory: Path, *arguments: Any, **more: Any) -> TokenStore:
            reports.update({path.name: path.stat().st_mtime_ns for path in directory.glob(".*.report.json")})
            return commit_store(directory, *arguments, **more)

        patch.setattr(stages_module, "commit_store", commit)
        directory = others.tokens(run.data.train[0], run, "pair")
    killer.join()
    assert 4 <= len(kept) < len(reports)
    assert {name: reports[name] for name in kept} == kept
    assert TokenStore.open(directory).digest == TokenStore.open(undisturbed).digest
    facts = TokenStore.open(directory).meta["preparation"]
    assert facts["rows"] == 8 * len(rows) and facts["units"] == len(reports)
    assert not [path for path in directory.iterdir() if path.name.startswith(".") and path.name != ".used"]


def test_a_unit_whose_shard_is_gone_is_prepared_again(
    workspace: Workspace, stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "LEAST_BYTES", 1 << 15)
    run = load_run(workspace.run("gone", data={"train": ["pairs.jsonl"], "max_prompt_tokens": 40, "max_tokens": 96}))
    undisturbed = stages.tokens(run.data.train[0], run, "pair")
    others = replace(stages, artifacts=Artifacts(root=tmp_path, note=lambda line: None))

    def interrupted(*arguments: object, **more: object) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "commit_store", interrupted)
        with pytest.raises(Interrupted):
            others.tokens(run.data.train[0], run, "pair")
    reports = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*/.*.report.json")}
    (gone,) = tmp_path.glob("tokens-*/000001.tokens")
    gone.unlink()
    again: dict[Path, int] = {}

    def commit(directory: Path, *arguments: Any, **more: Any) -> TokenStore:
        again.update({path: path.stat().st_mtime_ns for path in reports})
        return commit_store(directory, *arguments, **more)

    monkeypatch.setattr(stages_module, "commit_store", commit)
    directory = others.tokens(run.data.train[0], run, "pair")
    assert len(reports) > 2 and [path.name for path in reports if again[path] != reports[path]] == [
        ".000001.report.json"
    ]
    assert TokenStore.open(directory).digest == TokenStore.open(undisturbed).digest


@pytest.mark.slow
def test_reference_is_shared_by_what_it_depends_on(
    workspace: Workspace, store: Path, stages: Stages, notes: list[str]
) -> None:
    run = load_run(workspace.run("stages"))
    first = stages.reference(store, run)
    notes.clear()
    other_beta = load_run(workspace.run("stages", method={"name": "ipo"}, optim={"lr": 1e-6, "steps": 3}))
    budget = {"optim": run.optim.model_copy(update={"lr": 1e-6})}
    assert stages.reference(store, other_beta.model_copy(update=budget)) == first
    assert notes == [f"reference: found {first.name}"]
    warmer = load_run(workspace.run("stages", method={"name": "dpo", "logit_temperature": 2.0}))
    second = stages.reference(store, warmer)
    assert second != first
    plain, warm = (TokenStore.open(store).with_columns(columns) for columns in (first, second))
    assert not np.allclose(plain[0].per_token["ref_token_logp"], warm[0].per_token["ref_token_logp"])


def test_bad_rows_are_quarantined_and_the_rest_is_kept(workspace: Workspace, stages: Stages) -> None:
    case = BAD_INPUTS["wrong_type"]
    (workspace.folder / "dirty.jsonl").write_bytes(case.content + b"\xff\n" + line(prompt="Why?") + b"\n{")
    data = {"train": ["dirty.jsonl"], "max_prompt_tokens": 48, "max_tokens": 96, "max_bad_fraction": 0.5}
    run = load_run(workspace.run("dirty", data=data))
    directory = stages.tokens(run.data.train[0], run, "pair")
    opened = TokenStore.open(directory)
    assert [opened[index].line for index in range(len(opened))] == [1, 3, 5]
    bad = [json.loads(row) for row in (directory / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["field"]) for row in bad] == [(2, "chosen"), (4, ""), (6, "")]
    assert opened.meta["preparation"]["rows"] == 6 and opened.meta["preparation"]["bad"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(BAD_INPUTS["wrong_type"].content, "1 of 3 rows are bad (33.33%)", id="too many bad rows"),
        pytest.param(b"", "the file is empty", id="empty", marks=pytest.mark.slow),
        pytest.param(line(rejected=...), "rejected is missing", id="no good row", marks=pytest.mark.slow),
    ],
)
def test_data_that_cannot_be_used_end_the_command(
    content: bytes, message: str, workspace: Workspace, session: Session
) -> None:
    (workspace.folder / "unusable.jsonl").write_bytes(content)
    refused = rayalign("train", workspace.run("unusable", data={"train": ["unusable.jsonl"]}))
    assert refused.code == 2
    assert "error: " in refused.printed and message in refused.printed
    assert "Traceback" not in refused.printed and not workspace.directory("unusable").exists()


@pytest.mark.slow
def test_a_tokenizer_that_does_not_load_ends_the_command(workspace: Workspace, session: Session) -> None:
    refused = rayalign("train", workspace.run("absent"), "data.stop=<|absent|>")
    assert refused.code == 2
    assert "<|absent|>" in refused.printed and "Traceback" not in refused.printed
