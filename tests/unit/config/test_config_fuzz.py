"""Whatever a configuration says, the answer is a run, a comparison, or a message; nothing else is raised."""

from __future__ import annotations

import contextlib
import datetime
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from settings import leaves

from rayalign.config import load_compare, load_run
from rayalign.config.dump import dump
from rayalign.config.resume import identity
from rayalign.config.run import RunConfig
from rayalign.errors import UserError

TRIES = 2
"""Values that each key is given."""

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**30, math.nan, math.inf, "1e-6", "1e400", datetime.date(2024, 1, 1), b"ab"),
    *("", " ", "x", "a\nb", "\0", "a" * 5000, "~nobody-here/x", "../../..", "s3://", "http://[::1", "{{ x", "**/["),
    *(":f", "module:", "file.py:f", "a b:c d", "/nowhere/y.py:f", "nowhere:f"),
    *([], [1], [None], ["x"], [[]], [{"path": "x", "weight": "y"}]),
    *({}, {"a": 1}, {"name": "x"}, {"name": None}, {"name": []}, {"name": "rule"}, {"name": "wpo"}, {1: 2}),
)

OFF: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": ["t.jsonl"]}, "method": {"name": "dpo"}}
ON = OFF | {
    "data_policy": {"name": "on_policy"},
    "rollout": {"engine": "hf"},
    "scorer": {"name": "rule", "function": "m:f"},
}

DOCUMENTS = {
    "nothing": "",
    "null": "null",
    "a list": "- a",
    "a number": "5",
    "a tab": "a:\n\tb: 1",
    "deep": "a: " + "[" * 500 + "]" * 500,
    "a program": "a: !!python/object:os.system x",
    "an unknown tag": "model: !foo bar",
    "a date": "name: 2024-01-01",
    "a date that is none": "name: 2001-99-99",
    "binary": "\0\1",
    "twice": "a: 1\na: 2",
    "a key that is a list": "? [a, b]\n: 1",
    "a key that is a number": "1: 2",
    "a key that is a boolean": "on: 2",
    "a key that is nothing": "~: 2",
    "in itself": "a: &x [*x]",
    "an unknown anchor": "a: *x",
    "a merge with a number": "a: {<<: 5}",
    "two documents": "a: 1\n---\nb: 2",
    "a byte order mark": "\ufeffa: 1",
    "a number without end": f"seed: {'9' * 5000}",
    "a set": "a: !!set {x, y}",
    "half a character": 'name: "\\ud800"',
    "another version": "%YAML 9.9\n---\na: 1",
}

COMPARISONS = (
    "base: 5\ngrid: {seed: [0]}",
    "base: null\ngrid: null",
    "base: .\ngrid: {seed: [0]}",
    "base: {}\ngrid: []",
    "base: BASE\ngrid: {method: {dpo: 1}}",
    "base: BASE\ngrid: {method: [1, null, true, [a], {name: [x]}, {as: 5}, {}]}",
    "base: BASE\ngrid: {'': [0]}",
    "base: BASE\ngrid: {seed.a.b: [0]}",
    "base: BASE\ngrid: {seed: [0]}\ntune: 5",
    "base: BASE\ngrid: {seed: [0]}\ntune: {over: {optim.lr: [a, {b: 1}, null]}}",
    "base: BASE\ngrid: {seed: [0]}\ninitial: {a: 1}",
    "base: {model: {name: m}, data: {train: t}, method: {name: 5}}\ngrid: {method: [wpo]}",
    "base: {model: {name: m}, data: {train: t}, method: {name: 'nope:X', beta: 1}}\ngrid: {method: [wpo]}",
    "base: {model: {name: m}, data: {train: t}, method: dpo, label: 5, data_policy: [x]}\ngrid: {label: [wpo]}",
    "base: BASE\ngrid: {seed: [0]}\nreport: {kl_levels: [a]}\nprices: 5\nbudget: {}",
)

OVERRIDES = (
    *("=", "a", "=1", "a=", "..=1", ".a=1", "a..b=1", "a[=1", "a]=1", "a[0]=1", "a[-1]=1", "data.train[0][0]=1"),
    *("model=x", "model.name.x=1", "data.train.x=1", "method.name=5", "method=[a]", "method={name: [x]}"),
    *("optim.lr={a: }", "seed={", "x='", "seed=!!python/x y", "model.name=~nobody-here/x", "strategy.workers.a=1"),
    *("data.train=5", "data.train[0]=5", "data.train[7].path=x", "name=\0", "track[0]=5", "label=5", "base.x=1"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def answered(path: Path | None, overrides: list[str] | None = None) -> None:
    with contextlib.suppress(UserError):
        run = load_run(path, overrides or [])
        dump(run)
        identity(run)


def compared(path: Path, overrides: list[str] | None = None) -> None:
    with contextlib.suppress(UserError):
        load_compare(path, overrides or [])


def test_any_value_of_any_key(path: Path) -> None:
    draw = random.Random(0)
    for key, _ in leaves(RunConfig):
        for value in draw.sample(VALUES, TRIES):
            path.write_text(yaml.safe_dump(with_value(ON, key, value)))
            answered(path)


def test_any_key_misspelt(path: Path) -> None:
    draw = random.Random(1)
    keys = [re.sub(r"\[\w+\]", "", key) for key, _ in leaves(RunConfig)]
    blocks = [key.rpartition(".")[0] for key in keys if "." in key]
    for key in dict.fromkeys([*keys, *blocks]):
        head, _, last = key.rpartition(".")
        place = draw.randrange(len(last))
        misspelt = f"{head}.{last[:place]}{last[place + 1 :] or 'x'}".removeprefix(".")
        path.write_text(yaml.safe_dump(with_value(ON, misspelt, draw.choice([1, "x", {}, {"name": "m"}, ["x"]]))))
        answered(path)


def with_value(document: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``document`` with ``value`` at ``key``, such as ``scorer[rule].unit``, in a block of that name."""
    head, _, rest = key.partition(".")
    name, _, kind = head.rstrip("]").partition("[")
    if not rest:
        return document | {name: value}
    inner = document.get(name)
    if isinstance(inner, list):
        return document | {name: [with_value({"path": "t.jsonl"}, rest, value)]}
    block = (inner if isinstance(inner, dict) else {}) | ({"name": kind} if kind else {})
    return document | {name: with_value(block, rest, value)}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_any_document(path: Path, what: str) -> None:
    path.write_bytes(DOCUMENTS[what].encode("utf-8", "surrogatepass"))
    answered(path)
    compared(path)


@pytest.mark.parametrize("text", COMPARISONS)
def test_any_comparison(path: Path, text: str) -> None:
    path.write_text(re.sub(r"\bBASE\b", "{model: {name: m}, data: {train: t}, method: dpo}", text))
    compared(path)


@pytest.mark.parametrize("override", OVERRIDES)
def test_any_override(path: Path, override: str) -> None:
    path.write_text(yaml.safe_dump(OFF))
    answered(path, [override])
    answered(None, [override])
    path.write_text(yaml.safe_dump({"base": OFF, "grid": {"method": ["dpo", "wpo"]}}))
    compared(path, [override])
    compared(path, [f"base.{override}"])


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    for name in ("bytes.yaml", ".", "missing.yaml", "x" * 5000, "a\0b"):
        with pytest.raises(UserError):
            load_run(tmp_path / name)
