"""What a stage's key is made of, and stages that are made anew."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_runs import save_tiny

from rayalign.comparison.plan import Plan
from rayalign.config import load_run
from rayalign.config.data import DataSource
from rayalign.data.tokenize_rows import Unit
from rayalign.errors import MissingExtra, UserError
from rayalign.placement import Node
from rayalign.run.reads import with_format
from rayalign.run.stages import Stages, input_digest, source_units
from rayalign.run.train import refuse_unsupported
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts
from rayalign.storage.manifest import commit


def stages_of(folder: Path) -> Stages:
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    return Stages(artifacts=Artifacts(root=folder / "artifacts"), session=session)


def test_the_manifest_of_made_rows_has_no_secret(tmp_path: Path) -> None:
    (tmp_path / "maker.py").write_text("def rows(api_key, n):\n    yield {'prompt': 'a'}\n")
    source = DataSource(function=f"{tmp_path}/maker.py:rows", arguments={"api_key": "sk-planted", "n": 3})
    made = stages_of(tmp_path).rows(f"{tmp_path}/maker.py:rows", source)
    assert json.loads((made.parent / "MANIFEST.json").read_text())["inputs"]["arguments"] == {
        "api_key": "(redacted)",
        "n": 3,
    }
    assert not [path for path in made.parent.rglob("*") if path.is_file() and "sk-planted" in path.read_text()]


def test_a_key_is_of_a_files_content_and_of_the_rows_that_are_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    whole, same = (Unit(path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b"))
    part = Unit(path=whole.path, first=0, last=1)
    assert input_digest(whole) == input_digest(same) != input_digest(part)
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}\n')
    assert input_digest(whole) != input_digest(same)


def test_whatever_changes_tokens_changes_their_key(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)

    def key(*settings: str) -> str:
        run = load_run(None, [f"model.name={model}", "method.name=dpo", f"data.train={rows}", *settings])
        plan = Plan(root=tmp_path / "artifacts")
        session = stages_of(tmp_path).session
        return Stages(artifacts=plan, session=session).tokens(run.data.train[0], run, "pair").name

    source = f"data.train=[{{path: {rows}, %s}}]"
    keys = [
        key(*settings)
        for settings in (
            [],
            ["data.system=Be brief."],
            ["data.date=2025-01-01"],
            ["data.chat_template_kwargs={a: 1}"],
            ["data.format=preference"],
            [source % "system: Be kind."],
            [source % "chat_template_kwargs: {a: 1}"],
            [source % "max_samples: 2"],
            [source % "columns: {margin: m}"],
        )
    ]
    assert len({*keys}) == len(keys) and key() == keys[0] == key(source % "weight: 2")
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    assert key() != keys[0]


def test_a_version_makes_rows_again(tmp_path: Path) -> None:
    """Of what a function reads besides its own file, which nothing else could tell."""
    (tmp_path / "maker.py").write_text("def rows():\n    yield {'prompt': 'a'}\n")
    made = [
        stages_of(tmp_path).rows(
            f"{tmp_path}/maker.py:rows", DataSource(function=f"{tmp_path}/maker.py:rows", version=version)
        )
        for version in (None, 1, "2024-05-01", 1)
    ]
    assert len({*made}) == 3 and made[1] == made[3]


def test_a_folder_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "run [1]" / "pairs.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    run = load_run(None, ["model.name=m", f"data.train={path}", "method.name=dpo"])
    assert [unit.path for unit in source_units(run.data.train[0], run.data, stages_of(tmp_path))] == [str(path)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"arguments": {"m": 2}}, "unexpected keyword argument 'm'"),
        ({}, "row 2 cannot be written as JSON"),
    ],
)
def test_a_maker_of_rows_that_fails_says_where(tmp_path: Path, source: dict[str, object], message: str) -> None:
    (tmp_path / "maker.py").write_text("def rows(n=1):\n    yield {'prompt': 'a'}\n    yield {'prompt': {1, 2}}\n")
    with pytest.raises(UserError, match=message):
        stages_of(tmp_path).rows(
            f"{tmp_path}/maker.py:rows", DataSource(function=f"{tmp_path}/maker.py:rows", **source)
        )  # type: ignore[arg-type]


def test_fresh_makes_a_stage_from_nothing_and_once(tmp_path: Path) -> None:
    builds = []

    def build(directory: Path) -> None:
        builds.append(sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")))
        (directory / "shard").write_text("old" if len(builds) == 1 else "new")
        commit(directory, {})

    Artifacts(root=tmp_path).stage("reference", {}, build)
    fresh = Artifacts(root=tmp_path, fresh=frozenset({"reference"}))
    for _ in range(2):
        assert (fresh.stage("reference", {}, build) / "shard").read_text() == "new"
    assert builds == [[], []]


def test_fresh_names_a_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--fresh refrence: there is no such stage; there are rows, tokens"):
        Artifacts(root=tmp_path, fresh=frozenset({"refrence"}))


def test_what_an_auxiliary_stream_reads_follows_from_its_term() -> None:
    source = DataSource(path="sft.jsonl")
    assert with_format(source, "pretrain").format == "text"
    assert with_format(source, "reference").format == "auto"
    assert with_format(DataSource(path="sft.jsonl", format="messages"), "pretrain").format == "messages"


def test_a_tracker_that_is_not_installed_is_missed_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = load_run(None, ["model.name=m", "data.train=t.jsonl", "method.name=dpo", "track=wandb"])
    with pytest.raises(MissingExtra, match="pip install 'rayalign.tracking.'"):
        refuse_unsupported(run)
