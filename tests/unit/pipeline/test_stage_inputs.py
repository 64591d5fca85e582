"""What a stage's key is made of, and stages that are made anew."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from rayalign.config import load_run
from rayalign.config.data import DataSource
from rayalign.data.prepare import Unit
from rayalign.errors import MissingExtra, UserError
from rayalign.manifest import commit
from rayalign.pipeline.artifacts import Artifacts
from rayalign.pipeline.stages import Stages, input_digest, source_units
from rayalign.pipeline.streams import with_format
from rayalign.pipeline.train import refuse_unsupported
from rayalign.runtime.session import Node, Session


def stages_of(folder: Path) -> Stages:
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    return Stages(artifacts=Artifacts(root=folder / "artifacts"), session=session)


def test_the_manifest_of_made_rows_has_no_secret(tmp_path: Path) -> None:
    (tmp_path / "maker.py").write_text("def rows(api_key, n):\n    yield {'prompt': 'a'}\n")
    source = DataSource(function=f"{tmp_path}/maker.py:rows", arguments={"api_key": "sk-planted", "n": 3})
    made = stages_of(tmp_path).rows(source)
    assert json.loads((made.parent / "MANIFEST.json").read_text())["inputs"]["arguments"] == {
        "api_key": "(redacted)",
        "n": 3,
    }
    assert not [path for path in made.parent.rglob("*") if path.is_file() and "sk-planted" in path.read_text()]


def test_splits_of_a_dataset_folder_are_different_rows(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    units = [Unit(path=str(tmp_path), split=split) for split in ("train", "test")]
    assert input_digest(units[0]) != input_digest(units[1])
    assert input_digest(units[0]) == input_digest(Unit(path=str(tmp_path), split="train"))


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
        stages_of(tmp_path).rows(DataSource(function=f"{tmp_path}/maker.py:rows", **source))  # type: ignore[arg-type]


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
