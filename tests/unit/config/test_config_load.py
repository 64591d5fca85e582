"""From YAML and command line to a run: defaults, paths, overrides, and back."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import MINIMAL
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.config import ConfigError, RunConfig, diff, dump, load_run, to_yaml
from rayalign.config.data import Format
from rayalign.config.document import Document, apply_overrides, read_document
from rayalign.data.formats import FORMATS

OFFLINE = ["model.name=gpt2", "data.train=pairs.jsonl", "method.name=dpo"]


def test_a_run_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_run(None, [*OFFLINE, "optim.lr=5e-7", "method.beta=0.2"])
    assert (run.name, run.seed, run.storage_path, run.data_policy.name) == ("run", 0, "runs", "off_policy")
    assert [source.path for source in run.data.train] == [str(tmp_path / "pairs.jsonl")]
    assert (run.optim.lr, run.optim.steps, run.optim.epochs) == (5e-7, None, 1.0)
    assert run.method.config.model_dump()["beta"] == 0.2
    assert run.display_name == "dpo"


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "method: {name: dpo, beta: 1e-1}\noptim: {lr: 5e-7}\n")
    run = load_run(path, ["optim.eps=1e-9"])
    assert yaml.safe_load("5e-7") == "5e-7"
    assert (run.optim.lr, run.optim.eps, run.method.config.model_dump()["beta"]) == (5e-7, 1e-9, 0.1)


def test_inputs_resolve_beside_the_yaml_and_results_do_not(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "extra").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(
        """
storage_path: results
model: {name: tiny, reference: org/reference}
data:
  train:
    [pairs.jsonl, ../more/*.parquet, extra, org/hub-dataset, "s3://bucket/p.jsonl", /data/a, {function: "makers:rows"}]
  template: chat.jinja
method: dpo
"""
    )
    run = load_run(path)
    assert (run.storage_path, run.model.name, run.model.reference) == ("results", f"{tmp_path}/tiny", "org/reference")
    assert [source.path for source in run.data.train] == [
        f"{tmp_path}/pairs.jsonl",
        f"{tmp_path.parent}/more/*.parquet",
        f"{tmp_path}/extra",
        "org/hub-dataset",
        "s3://bucket/p.jsonl",
        "/data/a",
        None,
    ]
    assert (run.data.train[-1].function, run.data.template) == ("makers:rows", f"{tmp_path}/chat.jinja")


def test_a_method_is_found_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "losses_beside_yaml.py").write_text(
        "from dataclasses import replace\n"
        "from rayalign.methods import resolve\n"
        "MINE = replace(resolve('dpo'), name='mine')\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "method: {name: losses_beside_yaml:MINE, beta: 0.5}\n")
    run = load_run(path)
    assert (run.method.name, run.display_name) == ("losses_beside_yaml:MINE", "mine")
    assert RunConfig.model_validate(dump(run)) == run


def test_the_last_override_wins_and_blocks_are_made(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "method: dpo\ntrack: [tensorboard, wandb]\nevaluate: null\n")
    settings = ["evaluate.prompts=p.jsonl", "track.1=tensorboard", "seed=1", "seed=2", "track.0=wandb"]
    run = load_run(path, settings)
    assert run.evaluate is not None
    assert (run.evaluate.prompts[0].path, run.seed, run.track) == (f"{tmp_path}/p.jsonl", 2, ("wandb", "tensorboard"))


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy.workers=2", "strategy=ddp"],
        ["strategy=ddp", "strategy.workers=2"],
        ["strategy={name: ddp}", "strategy.workers=2"],
        ["strategy.workers=2", "strategy.name=ddp"],
    ],
)
def test_a_block_and_its_settings_may_be_given_in_any_order(settings: list[str]) -> None:
    run = load_run(None, [*OFFLINE, *settings])
    assert (run.strategy.name, run.strategy.workers) == ("ddp", 2)


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        (["data.train[0].path=b.jsonl"], ["b.jsonl"]),
        (["data.train=[a.jsonl, {path: b.jsonl, weight: 2}]", "data.train[0].weight=3"], ["a.jsonl", "b.jsonl"]),
        (["data.train=[a.jsonl, b.jsonl]", "data.train[1]=c.jsonl"], ["a.jsonl", "c.jsonl"]),
        (["data.train=[a.jsonl, b.jsonl]", "data.train.1.path=c.jsonl"], ["a.jsonl", "c.jsonl"]),
        (["data.train={path: a.jsonl}", "data.train[0].weight=3"], ["a.jsonl"]),
        (["data.train=null", "data.train[0].path=b.jsonl"], ["b.jsonl"]),
    ],
)
def test_items_of_lists_are_named_as_messages_name_them(settings: list[str], paths: list[str]) -> None:
    run = load_run(None, [*OFFLINE, *settings])
    assert [Path(str(source.path)).name for source in run.data.train] == paths
    assert run.data.train[0].weight == (3 if any(text.endswith("weight=3") for text in settings) else 1)


def test_short_names_open_into_blocks() -> None:
    settings = [
        "scorer=rule",
        "scorer.function=m:f",
        "method=dpo",
        "method.beta=0.2",
        "label.scale=3",
        "label=bradley_terry",
    ]
    run = load_run(None, [*OFFLINE, "data_policy=on_policy", "rollout.engine=hf", *settings])
    assert run.scorer is not None and run.label is not None
    assert (run.scorer.name, run.method.config.model_dump()["beta"]) == ("rule", 0.2)
    assert (run.label.name, run.label.scale) == ("bradley_terry", 3)


def test_what_the_command_line_adds_is_not_blamed_on_the_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "method: dpo\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path, ["foo.bar=1", "data.train[0].pth=x", "data.train[7].path=x", "data.train[x].path=x"])
    assert str(caught.value).splitlines() == [
        "command line: data.train[7].path: data.train has the items 0 to 0",
        "command line: data.train[x].path: 'train[x]' is no key; items of a list are counted from 0, as in "
        "data.train[0].path",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run(path, ["foo.bar=1", "data.train[0].pth=x"])
    assert [problem.where for problem in caught.value.problems] == ["command line"] * 2


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "doc.yaml"
    path.write_text("a: &x {lr: 1, steps: 2}\nb:\n  <<: *x\n  lr: 3\n")
    document = read_document(path)
    assert document.data == {"a": {"lr": 1, "steps": 2}, "b": {"lr": 3, "steps": 2}}
    assert document.place(("b", "lr")).where == f"{path}:4"
    assert document.place(("b", "steps", "x")).where == f"{path}:1"


@pytest.mark.parametrize(
    "extra",
    [
        "method: {name: simpo, gamma: 1.5}\n",
        "method: dpo\nweighting: {name: wpo, permute: true}\nauxiliary: [{data: sft.jsonl}]\n",
        "method: mpo\nauxiliary: []\n",
        "method: exo_rw\ndata_policy: {name: hybrid, mix: candidates}\nrollout: {actors: [0, 8]}\n"
        "scorer: {name: rule, function: 'm:f'}\nlabel: rewards\nstrategy: {name: ddp, workers: [2, 4]}\n",
        "method: kto\nevaluate: {at: [1, 2], prompts: p.jsonl, judge: {name: llm, model: m, base_url: 'http://h'}}\n",
        "method: dpo\nevaluate: {prompts: p.jsonl, judge: {name: llm, model: ./m, engine: hf, max_new_tokens: 9}}\n",
        "method: dpo\nevaluate: {prompts: p.jsonl, baseline: ./runs/other, max_missing_fraction: 0}\n",
    ],
)
def test_a_dumped_run_loads_as_the_same_run(tmp_path: Path, extra: str) -> None:
    first, second = tmp_path / "run.yaml", tmp_path / "elsewhere" / "again.yaml"
    first.write_text(MINIMAL + extra)
    run = load_run(first)
    second.parent.mkdir()
    second.write_text(to_yaml(run))
    assert load_run(second) == run
    assert diff(load_run(second), run) == []


def test_differences_name_field_and_values() -> None:
    left = load_run(None, [*OFFLINE, "optim.lr=1e-6"])
    right = load_run(None, [*OFFLINE, "optim.lr=2e-6", "weighting=wpo", "auxiliary=[]"])
    assert [str(difference) for difference in diff(left, right)] == [
        "optim.lr: 1e-06 → 2e-06",
        "weighting.alignment: None → sampled",
        "weighting.clamp: None → product",
        "weighting.which: None → both",
        "weighting.permute: None → False",
        "weighting.name: None → wpo",
        "auxiliary: None → []",
    ]


def test_secrets_do_not_reach_the_dump() -> None:
    arguments = "{api_key: k, hf_token: t, nested: {password: p}, max_tokens: 5, stop_token: {a: b}}"
    run = load_run(None, ["model.name=m", f"data.train=[{{function: 'm:f', arguments: {arguments}}}]", "method=dpo"])
    assert run.data.train[0].arguments["api_key"] == "k"
    assert dump(run)["data"]["train"][0]["arguments"] == {
        "api_key": "(redacted)",
        "hf_token": "(redacted)",
        "nested": {"password": "(redacted)"},
        "max_tokens": 5,
        "stop_token": {"a": "b"},
    }


def test_nothing_changes_after_parsing() -> None:
    run = load_run(None, OFFLINE)
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


def test_formats_are_those_that_the_data_room_reads() -> None:
    assert {*get_args(Format)} == {"auto", *FORMATS}


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.1, 10), (0.004, 0), (1, 1), (30, 30)])
def test_warmup_is_a_fraction_or_a_number_of_steps(warmup: float, steps: int) -> None:
    assert load_run(None, [*OFFLINE, f"optim.warmup={warmup}"]).optim.warmup_steps(100) == steps


KEYS = st.text(string.ascii_letters + "_", min_size=1, max_size=6)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
TREES = st.dictionaries(
    KEYS, st.recursive(VALUES, lambda inner: st.dictionaries(KEYS, inner, min_size=1), max_leaves=8)
)


def _as_overrides(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _as_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={yaml.safe_dump(value)}")
    return found


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_overrides_rebuild_any_tree(tree: dict[str, Any]) -> None:
    empty = Document(data={}, directory=Path())
    assert apply_overrides(empty, _as_overrides(tree)).data == tree
    assert empty.data == {}


def test_overriding_leaves_the_document_alone(tmp_path: Path) -> None:
    path = tmp_path / "doc.yaml"
    path.write_text("a: {b: [1, 2]}\n")
    document = read_document(path)
    changed = apply_overrides(document, ["a.b.0=5"])
    assert (document.data, changed.data) == ({"a": {"b": [1, 2]}}, {"a": {"b": [5, 2]}})
    assert changed.place(("a", "b", 0)).where == "command line"
    assert changed.place(("a", "b", 1)).where == f"{path}:1"
    with pytest.raises(ConfigError, match=r"command line: a\.b\.2: a\.b has the items 0 to 1"):
        apply_overrides(document, ["a.b.2=5"])


def test_an_interpreter_is_named_by_its_link(tmp_path: Path) -> None:
    """What a virtual environment's python points to is another environment's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/usr/bin/env")
    path = tmp_path / "run.yaml"
    path.write_text("method: dpo\nmodel: {name: m}\ndata: {train: a.jsonl}\noptim: {steps: 1}\n")
    settings = ["data_policy=on_policy", "scorer={name: rule, function: my:fn}", "rollout.python=./bin/python"]
    run = load_run(path, settings)
    assert run.rollout is not None and run.rollout.python == str(tmp_path / "bin" / "python")
