"""Prompt sets: the model reads what training wrote, scorers read text, and nothing is left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab.world import pairs

from rayalign.comparison.prompts import prompt_sets, prompt_text, read_examples
from rayalign.config import load_run
from rayalign.config.data import TokenBudget
from rayalign.config.run import RunConfig
from rayalign.data.chat import make_chat
from rayalign.data.records import RawRow
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.judge.measure import Prompt
from rayalign.placement import Node
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

LAB_MODEL = Path(__file__).parents[3] / "examples" / "lab" / "model"


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_with(*settings: str) -> RunConfig:
    common = [f"model.name={LAB_MODEL}", "model.from_scratch=true", "method.name=dpo", "data.max_prompt_tokens=128"]
    return load_run(None, [*common, "data.max_tokens=256", *settings])


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    return Stages(artifacts=Artifacts(root=tmp_path / "artifacts"), session=session)


def sets_of(run: RunConfig, stages: Stages) -> dict[str, tuple[Prompt, ...]]:
    assert run.evaluated is not None
    return prompt_sets(run.evaluated, stages)


def test_prompts_are_tokenized_as_training_does(tmp_path: Path, stages: Stages) -> None:
    rows = pairs(0, 4)
    path = write(tmp_path / "pairs.jsonl", rows)
    run = run_with(f"data.train={path}", f"data.eval={path}", "evaluate.every=1")
    [(label, prompts)] = sets_of(run, stages).items()
    raw = [RawRow(source=path, line=line, value=row) for line, row in enumerate(rows, 1)]
    trained = rows_to_groups(
        raw, make_chat(load_tokenizer(LAB_MODEL)), TokenBudget(max_prompt_tokens=128, max_tokens=256)
    )
    assert label == "eval"
    assert [list(prompt.ids) for prompt in prompts] == [
        outcome.group.prompt_ids.tolist() for outcome in trained if isinstance(outcome, Tokenized)
    ]
    assert [prompt.text for prompt in prompts] == [row["prompt"][0]["content"] for row in rows]


def test_a_prompt_counts_once(tmp_path: Path, stages: Stages) -> None:
    [row] = pairs(0, 1)
    path = write(tmp_path / "pairs.jsonl", [row, row, *pairs(1, 2)])
    run = run_with(f"data.train={path}", f"data.eval={path}", "evaluate.every=1")
    assert len(read_examples(run.data.eval[0], run, stages)) == 3


def test_a_bad_prompt_is_an_error_with_its_line(tmp_path: Path, stages: Stages) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": 3}])
    run = run_with(f"data.train={path}", f"evaluate.prompts={path}")
    with pytest.raises(UserError, match=r"prompts.jsonl:2: prompt must be a text or a list of turns, not a number"):
        sets_of(run, stages)


def test_sets_are_named_after_their_files(tmp_path: Path, stages: Stages) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": "hello ,"}]) for name in ("shop", "travel")]
    run = run_with(f"data.train={paths[0]}", f"evaluate.prompts=[{', '.join(paths)}]")
    assert list(sets_of(run, stages)) == ["shop", "travel"]
    twice = run_with(f"data.train={paths[0]}", f"evaluate.prompts=[{paths[0]}, {paths[0]}]")
    with pytest.raises(UserError, match="two sets have the same name"):
        sets_of(twice, stages)


def test_a_conversation_reads_as_a_transcript(tmp_path: Path, stages: Stages) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes ?"},
        {"role": "user", "content": "help"},
    ]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": turns}])
    run = run_with(f"data.train={path}", f"evaluate.prompts={path}")
    [example] = read_examples(run.evaluate.prompts[0], run, stages)  # type: ignore[union-attr]
    assert prompt_text(example.prompt) == "\n\nHuman: hello\n\nAssistant: yes ?\n\nHuman: help"


def test_prompts_need_not_come_as_the_rows_that_are_trained_on(tmp_path: Path, stages: Stages) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    run = run_with("data.train=t.jsonl", "data.format=preference", f"evaluate.prompts={prompts}")
    assert [prompt.text for prompt in sets_of(run, stages)["prompts"]] == ["Why?"]
