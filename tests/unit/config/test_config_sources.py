"""What a YAML may say of a source of rows, and how its path resolves."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import yaml

from rayalign.config import ConfigError, load_run
from rayalign.config.data import DataConfig, DataSource
from rayalign.config.dump import dump
from rayalign.config.run import RunConfig
from rayalign.config.suffixes import Suffix, data_suffix
from rayalign.data.template import TODAY


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("/b/c.JSONL.GZ", (".jsonl", ".gz")),
        ("a.tsv.zst", (".tsv", ".zst")),
        ("a.pq", (".pq", "")),
        ("https://host/a.parquet?download=true", (".parquet", "")),
        ("https://host/a?file=b.jsonl", None),
        ("zip://a.json::s3://bucket/b.zip", (".json", "")),
        ("a.gz", (".jsonl", ".gz")),
        ("a.tar.gz", None),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("org/data.set", None),
    ],
)
def test_what_a_files_name_says(name: str, suffix: tuple[str, str] | None) -> None:
    assert data_suffix(name) == (None if suffix is None else Suffix(*suffix))


def load(folder: Path, **data: object) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "method": "dpo", "data": data}))
    return load_run(path)


def test_paths_resolve_beside_the_yaml_where_they_are_files_or_patterns(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    paths = ["a.CSV", "b.jsonl.zst", "folder", "more/*", "org/name", "s3://bucket/*.jsonl"]
    found = [source.path for source in load(tmp_path, train=paths).data.train]
    assert found == [*(f"{tmp_path}/{path}" for path in paths[:4]), *paths[4:]]


def test_all_that_a_source_may_say(tmp_path: Path) -> None:
    source = {
        "path": "org/name",
        "config": "main",
        "data_dir": "inside",
        "data_files": "*.jsonl",
        "split": ["train[:10%]", "test"],
        "revision": "v1",
        "max_samples": 7,
        "system": "Be brief.",
        "chat_template_kwargs": {"enable_thinking": False},
        "columns": {"system": "instructions", "preferred": "better_response_id", "reward": "correctness"},
    }
    run = load(tmp_path, train=[source], system="Be kind.", chat_template_kwargs={"tone": 1}, date=date(2025, 1, 2))
    [own] = run.data.train
    assert (own.data_files, own.split, own.max_samples) == (("*.jsonl",), ("train[:10%]", "test"), 7)
    assert (run.data.system, run.data.chat_template_kwargs, run.data.date) == (
        "Be kind.",
        {"tone": 1},
        date(2025, 1, 2),
    )
    assert RunConfig.model_validate(dump(run)) == run


def test_the_date_is_that_of_the_templates() -> None:
    assert DataConfig(train=(DataSource(path="a.jsonl"),)).date == TODAY


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.jsonl", "config": "main"}, "config belongs to a dataset; this source is a file"),
        ({"path": "a.parquet", "split": "test"}, "split belongs to a dataset; this source is a file"),
        ({"function": "m:f", "data_dir": "x"}, "data_dir belongs to a dataset; this source has a function"),
        ({"path": "a.jsonl", "version": 2}, "version is of what a function reads"),
        ({"path": "a.jsonl", "max_samples": 0}, "0 must be at least 1"),
        ({"path": "a.jsonl", "columns": {"turns": "t"}}, "no row has a field 'turns'"),
    ],
)
def test_what_a_source_may_not_say(source: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, train=[source])
