"""Where rows lie: patterns, folders, saved datasets, configurations, splits, addresses, the Hub; and their keys."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import FileServer, serving

from rayalign.data.content import content_key
from rayalign.data.origin import Origin, RowRange, find_ranges
from rayalign.data.records import RawRow
from rayalign.data.tables import read_rows
from rayalign.errors import MissingExtra, UserError

datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")


def write(path: Path, *prompts: str) -> Path:
    """A file of rows with a prompt each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt} for prompt in prompts]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(path: Path | str, **fields: Any) -> list[str]:
    """The prompts of all rows that an origin names."""
    return [prompt for part in find_ranges(Origin(path=str(path), **fields)) for prompt in of_part(part)]


def of_part(part: RowRange) -> list[str]:
    rows = list(read_rows(part.path))[part.first : part.last]
    return [row.value["prompt"] for row in rows if isinstance(row, RawRow)]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        find_ranges(Origin(path=str(path), **fields))
    return str(caught.value)


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "quarantine.jsonl", "bad")
    write(tmp_path / "deep" / "c.jsonl", "c")
    assert prompts(tmp_path / "*.jsonl") == ["a", "b"]
    assert prompts(tmp_path / "**" / "*.jsonl") == ["a", "b", "c"]
    assert prompts(tmp_path / "[a]*") == ["a"]
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt: rows are read from JSON" in refusal(tmp_path / "*")


def test_a_pattern_that_matches_nothing_says_what_lies_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", "a")
    assert refusal(tmp_path / "*.jsonl") == f"no file matches {tmp_path}/*.jsonl; that folder holds a.parquet"
    assert refusal(tmp_path / "absent" / "*.jsonl").endswith(f"there is no folder {tmp_path}/absent")


def test_a_folder_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    assert prompts(write(tmp_path / "run [1]" / "a.jsonl", "a")) == ["a"]


def test_files_of_a_folder_are_read_one_by_one(tmp_path: Path) -> None:
    """Their columns and kinds may differ."""
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.JSONL").write_text('{"prompt": "b", "score": {"x": 1}}\n{"prompt": "c", "score": "high"}\n')
    write(tmp_path / "d.parquet", "d")
    (tmp_path / "README.md").write_text("# Rows\n")
    assert prompts(tmp_path) == ["a", "b", "c", "d"]


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", "a")
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", "b")
    write(tmp_path / "data" / "test_sft-00000-of-00001.jsonl", "c")
    assert prompts(tmp_path) == ["a", "b"]
    assert prompts(tmp_path, splits=("test_sft",)) == ["c"]
    assert prompts(tmp_path, splits=("test_sft", "train")) == prompts(tmp_path, splits=("test_sft+train",))
    assert "there is no split 'dev', but train, test_sft; write split: train" in refusal(tmp_path, splits=("dev",))
    (tmp_path / "data" / "train-00000-of-00002.jsonl").unlink()
    assert "train-00000-of-00002.jsonl is missing; fetch the dataset again" in refusal(tmp_path)


def test_a_file_of_no_split_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "a")
    write(tmp_path / "more.jsonl", "b")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert "more.jsonl is of no split, but other files are named as train; write split: train" in refusal(tmp_path)
    assert prompts(tmp_path, splits=("train",)) == ["a"]
    assert prompts(tmp_path, data_files=("*.jsonl",)) == ["b", "a"]


def test_slices_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", *"abcdef")
    write(tmp_path / "train-1.parquet", *"ghij")
    assert prompts(tmp_path, splits=("train[:20%]",)) == ["a", "b"]
    assert prompts(tmp_path, splits=("train[5:8]", "train[-1:]")) == ["f", "g", "h", "j"]
    assert prompts(tmp_path, splits=("train[90%:]",)) == ["j"]
    assert prompts(tmp_path, max_samples=7) == list("abcdefg")
    assert prompts(tmp_path, splits=("train[4:]",), max_samples=3) == list("efg")
    assert prompts(tmp_path / "train-1.parquet", max_samples=100) == list("ghij")
    assert "is no split or slice, such as train[:1000]" in refusal(tmp_path, splits=("train[first]",))


CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/*.parquet}
  - {split: test, path: held/*.jsonl}
- config_name: harmless
  data_files: harmless/a.jsonl
---
# Rows
"""


@pytest.fixture
def with_card(tmp_path: Path) -> Path:
    write(tmp_path / "main" / "a.parquet", "m")
    write(tmp_path / "held" / "a.jsonl", "t")
    write(tmp_path / "harmless" / "a.jsonl", "h")
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def test_configurations(with_card: Path) -> None:
    assert prompts(with_card, config="main") == ["m"]
    assert prompts(with_card, config="main", splits=("test",)) == ["t"]
    assert prompts(with_card, config="harmless") == ["h"]
    assert prompts(with_card, data_dir="harmless") == ["h"]
    assert prompts(with_card, data_files=("held/*", "harmless/a.jsonl")) == ["t", "h"]
    assert refusal(with_card).endswith("has the configurations main, harmless; write config: main")
    assert "there is no configuration 'helpful', but main, harmless" in refusal(with_card, config="helpful")
    assert "there is no file of rows in it" in refusal(with_card, data_files=("harmful/*",))
    (with_card / "held" / "b.xlsx").write_text("")
    assert "b.xlsx: rows are read from JSON" in refusal(with_card, data_files=("held/*",))


def test_a_configuration_as_name_is_no_label(with_card: Path) -> None:
    """As Hugging Face and axolotl call it."""
    assert refusal(with_card, label="main").endswith("write config: main")
    assert prompts(with_card, label="main", config="harmless") == ["h"]


def test_a_default_configuration(with_card: Path) -> None:
    (with_card / "README.md").write_text(CARD.replace("config_name: harmless", "config_name: default"))
    assert prompts(with_card) == ["h"]


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"prompt": list("abcde")})
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    assert prompts(tmp_path / "one") == list("abcde")
    dataset.select([3, 1]).save_to_disk(tmp_path / "chosen")
    assert prompts(tmp_path / "chosen") == ["d", "b"]
    splits = {"train_prefs": dataset, "test_prefs": dataset.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert prompts(tmp_path / "two", splits=("test_prefs", "train_prefs[:40%]")) == ["b", "a", "b"]
    assert refusal(tmp_path / "two").endswith(
        "there is no split 'train', but train_prefs, test_prefs; write split: train_prefs"
    )
    assert "was written by save_to_disk and has no config; remove it" in refusal(tmp_path / "two", config="main")


def test_folders_without_rows(tmp_path: Path) -> None:
    assert "doesn't contain any data files" in refusal(tmp_path)
    (tmp_path / "train.txt").write_text("a")
    assert "there is no file of rows in it; rows are read from JSON" in refusal(tmp_path)


def test_readers_of_other_tools_are_answered() -> None:
    assert refusal("json", data_files=("a.jsonl",)).endswith("write path: a.jsonl")


def test_a_name_that_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal("org/absent")
    assert "there is no file or folder" in said and "no way to the Hub" in said and "\n" not in said
    assert "hf download --repo-type dataset org/absent" in said
    assert "there is no such file or folder here" in refusal("org/with spaces/and more")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("datasets"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    write(tmp_path / "train.jsonl", "a")
    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(MissingExtra, match=r"pip install 'rayalign\[hub\]'"):
        find_ranges(Origin(path=str(tmp_path)))


# What is elsewhere.


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer()) as running:
        yield running


def test_addresses(server: FileServer) -> None:
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["b", "c"]}), table)
    server.files = {"/a.jsonl": b'{"prompt": "a"}\n', "/b.parquet": table.getvalue().to_pybytes()}
    assert prompts(f"{server.address}/a.jsonl?download=true") == ["a"]
    assert prompts(f"{server.address}/b.parquet", max_samples=1) == ["b"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/absent.jsonl", "404"),
        ("/page.jsonl", "is a web page, not rows; name the address of the file itself"),
        ("/empty.jsonl", "the file is empty"),
    ],
)
def test_addresses_that_give_no_rows(path: str, message: str, server: FileServer) -> None:
    server.files = {"/page.jsonl": b"<html>Sign in</html>", "/empty.jsonl": b""}
    with pytest.raises(UserError, match=message):
        prompts(server.address + path)


def test_an_address_that_refuses() -> None:
    with serving(FileServer()) as gone:
        address = gone.address
    with pytest.raises(UserError) as caught:
        prompts(f"{address}/a.jsonl")
    assert "cannot be read: Cannot connect to host 127.0.0.1" in str(caught.value)


def test_patterns_and_folders_of_other_file_systems() -> None:
    system = fsspec.filesystem("memory")
    for name, prompt in (("train-0", "a"), ("train-1", "b"), ("test-0", "c")):
        system.pipe(f"/origin/{name}.jsonl", json.dumps({"prompt": prompt}).encode())
    assert prompts("memory://origin/train-*.jsonl") == ["a", "b"]
    assert prompts("memory://origin/", splits=("test", "train[1:]")) == ["c", "b"]
    assert "no file matches memory://origin/*.csv" in refusal("memory://origin/*.csv")
    assert "nowhere" in refusal("nowhere://origin/*.csv")


def test_the_content_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nosuch.jsonl"), f"file://{tmp_path}/nosuch.jsonl"):
        with pytest.raises(UserError, match=r"nosuch.jsonl: (cannot be read: .*)?No such file or directory"):
            content_key(path)
    with pytest.raises(UserError, match="Is a directory"):
        content_key(str(tmp_path))


def test_keys_hold_content(tmp_path: Path, server: FileServer) -> None:
    path = write(tmp_path / "a.jsonl", "a")
    key = content_key(str(path))
    assert key == content_key(f"file://{path}") == content_key(str(write(tmp_path / "b.jsonl", "a")))
    write(path, "b")
    assert content_key(str(path)) == content_key(f"file://{path}") != key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({}, {}),
    ],
)
def test_keys_of_addresses_follow_what_the_server_says(
    before: dict[str, str], after: dict[str, str], server: FileServer
) -> None:
    """Or, where it says nothing, what it sends."""
    address = f"{server.address}/a.jsonl"
    server.files["/a.jsonl"], server.headers["/a.jsonl"] = b'{"prompt": "a"}', before
    key = content_key(address)
    assert content_key(address) == key == content_key(f"{address}?signed=1")
    server.files["/a.jsonl"], server.headers["/a.jsonl"] = b'{"prompt": "b"}', after
    assert content_key(address) != key


def test_keys_of_other_file_systems_change_with_the_file() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/keys/a.jsonl", b"1")
    key = content_key("memory://keys/a.jsonl")
    assert content_key("memory://keys/a.jsonl") == key
    system.pipe("/keys/a.jsonl", b"2")
    assert content_key("memory://keys/a.jsonl") != key


HUB = """
import json
from rayalign.data.content import content_key
from rayalign.data.origin import Origin, find_ranges
from rayalign.data.tables import read_rows
from rayalign.errors import UserError

def tried(**fields):
    try:
        parts = find_ranges(Origin(**fields))
        return [[part.path, [row.value["prompt"] for row in read_rows(part.path)]] for part in parts]
    except UserError as error:
        return str(error)

found = {
    "train": tried(path="org/pairs"),
    "test": tried(path="org/pairs", splits=("test",)),
    "dev": tried(path="org/pairs", splits=("dev",)),
    "revision": tried(path="org/pairs", revision="v2"),
    "absent": tried(path="org/absent"),
}
found["key"] = content_key(found["train"][0][0])
print(json.dumps(found))
"""


def test_datasets_of_the_hub_are_read_at_a_commit(server: FileServer, tmp_path: Path) -> None:
    """Through the real libraries, which read their settings when they are imported: in a process of its own."""
    server.commit = "c" * 40
    server.repositories["org/pairs"] = {
        f"data/{split}-00000-of-00001.jsonl": json.dumps({"prompt": split}).encode() for split in ("train", "test")
    }
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout.splitlines()[-1])
    address = f"hf://datasets/org/pairs@{server.commit}/data/train-00000-of-00001.jsonl"
    assert found["train"] == [[address, ["train"]]] and found["key"] == address
    assert [rows for _, rows in found["test"]] == [["test"]]
    assert found["dev"] == "org/pairs: there is no split 'dev', but train, test; write split: train"
    assert found["revision"] == "org/pairs: the dataset has no revision 'v2'"
    assert found["absent"].endswith("and the Hub shows you no dataset of that name")


OFFLINE = """
import json
from rayalign.data.origin import Origin, find_ranges
print(json.dumps([part.path for part in find_ranges(Origin(path="org/pairs"))]))
"""


def test_a_copy_of_a_dataset_serves_without_the_hub(tmp_path: Path) -> None:
    commit = "d" * 40
    repository = tmp_path / "hub" / "datasets--org--pairs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    write(repository / "snapshots" / commit / "train.jsonl", "a")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [str(repository / "snapshots" / commit / "train.jsonl")]
