"""Every YAML of the documentation is a configuration of this version, or a part of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, REPOSITORY, Block, blocks, copy_examples, page_id

from rayalign.config import ConfigError, load_compare, load_run
from rayalign.data.formats import FORMATS, parse_row
from rayalign.data.records import RawRow
from rayalign.data.schema import Example

RUN: dict[str, Any] = {"model": {"name": "model"}, "data": {"train": ["train.jsonl"]}, "method": {"name": "dpo"}}
FRESH = {
    **RUN,
    "data_policy": {"name": "on_policy"},
    "rollout": {"engine": "hf", "samples": 4},
    "scorer": {"name": "rule", "function": "my:fn"},
}
SURROUNDINGS: tuple[dict[str, Any], ...] = (
    RUN,
    FRESH,
    {**RUN, "model": {"name": "model", "lora": {}}},
    {**FRESH, "method": {"name": "grpo"}},
    {**FRESH, "method": {"name": "ppo"}},
    {**FRESH, "method": {"name": "sft"}},
)
"""Runs that a fragment may be part of."""
COMPARISON = {"base", "grid", "initial", "report", "tune", "budget", "prices"}
WITH_YAML = [page for page in PAGES if any(block.language == "yaml" for block in blocks(page))]
ROWS = REPOSITORY / "docs" / "how-to" / "data.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's files and the examples' modules lie."""
    copy_examples(tmp_path)
    shutil.copy(REPOSITORY / "examples" / "own_method" / "my_losses.py", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_YAML, ids=page_id)
def test_configurations(page: Path, folder: Path) -> None:
    found = blocks(page)
    for block in found:
        if "file" in block.marks:
            (folder / block.marks["file"]).write_text(block.text, encoding="utf-8")
    for block in found:
        if block.language == "yaml":
            check(block, folder)


def check(block: Block, folder: Path) -> None:
    document = yaml.compose(block.text, Loader=yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode), f"{block}: no keys"
    if "file" in block.marks:
        assert refused(folder / block.marks["file"]) == "", block
        return
    for fragment in fragments(document):
        reasons = [refused(written(base | fragment, folder)) for base in SURROUNDINGS]
        assert "" in reasons, f"{block}: {min(reasons, key=len)}"


def fragments(document: yaml.MappingNode) -> Iterator[dict[str, Any]]:
    """The whole block; where it names a key twice, its entries are alternatives."""
    values = yaml.constructor.SafeConstructor()
    entries = [(key.value, values.construct_object(value, deep=True)) for key, value in document.value]
    if len(dict(entries)) == len(entries):
        yield dict(entries)
    else:
        yield from ({key: value} for key, value in entries)


def written(data: dict[str, Any], folder: Path) -> Path:
    """The file of a run, or of a comparison where the fragment is a part of one."""
    if COMPARISON & data.keys():
        run = {key: value for key, value in data.items() if key not in COMPARISON}
        data = {"base": run, "grid": {"seed": [0]}, **{key: data[key] for key in data if key in COMPARISON}}
    path = folder / "fragment.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def refused(path: Path) -> str:
    """Why this file can not be started; empty where it can."""
    try:
        load_compare(path) if "grid" in yaml.safe_load(path.read_text()) else load_run(path)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("block", [own for page in PAGES for own in blocks(page)], ids=str)
def test_other_blocks_are_well_formed(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block), "exec")
    if block.language == "json":
        json.loads(block.text)


def test_rows_are_read_as_the_format_that_they_are_named_after() -> None:
    """``preference.jsonl`` on the page about data is of the format ``preference``."""
    files = {block.marks.get("file", "").removesuffix(".jsonl"): block for block in blocks(ROWS)}
    found = {name: formats_of(files[name]) for name in FORMATS if name in files}
    assert found == {name: {name} for name in found} and len(found) == 10


def formats_of(block: Block) -> set[str]:
    rows = [RawRow(value=json.loads(line), source=str(block), line=block.line) for line in block.text.splitlines()]
    return {row.format if isinstance(row, Example) else str(row) for row in map(parse_row, rows)}
