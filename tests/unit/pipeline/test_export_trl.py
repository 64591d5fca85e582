"""Exported pairs, tokenized by TRL itself: its trainer makes the stored tokens of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from datasets import Dataset
from shapes import ASK, BRIEF, LOOK, SEEN, SKY, TOOLS, answer, pair, thought, user
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import remove_none_values

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.records import RawRow
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize_rows import Unit, prepare_rows
from rayalign.engine.model.folder import tokenizer_digest
from rayalign.errors import UserError
from rayalign.verbs.export_trl import Exported, trl_pairs

BLUE, GREEN = [answer("Blue.")], [answer("Green.")]
CALL = [answer("", tool_calls=[SKY])]
PLAIN = pair(BRIEF, ASK, chosen=BLUE, rejected=GREEN)
TEXT = {"prompt": "What is it?", "chosen": "Blue.", "rejected": "Green."}
SETTINGS = TokenBudget(max_prompt_tokens=2_000, max_tokens=4_000)
CASES: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "turns": ("qwen2_5", [PLAIN], "turns"),
    "texts are what a user says": ("qwen2_5", [TEXT], "turns"),
    "a template that ends turns in another token": ("gemma", [pair(ASK, chosen=BLUE, rejected=GREEN)], "turns"),
    "one that begins texts": ("llama3", [PLAIN, TEXT], "turns"),
    "tool calls": ("qwen2_5", [pair(LOOK, chosen=CALL, rejected=GREEN, tools=TOOLS)], "turns"),
    "tool results": ("llama3_1", [pair(LOOK, *CALL, SEEN, chosen=BLUE, rejected=GREEN, tools=TOOLS)], "turns"),
    "variables": ("qwen3", [{**PLAIN, "chat_template_kwargs": {"enable_thinking": False}}], "turns"),
    "thoughts": ("qwen3", [pair(ASK, chosen=[thought("hm", "Blue.")], rejected=GREEN)], "turns"),
    "a cut prompt": ("deepseek_r1_distill", [PLAIN], "turns"),
    "a thought that TRL drops": (
        "deepseek_r1_distill",
        [pair(ASK, chosen=[thought("hm", "Blue.")], rejected=[thought("hu", "Green.")])],
        "texts",
    ),
    "an end that the template does not write": ("glm4moe", [PLAIN], "texts"),
    "a date that is another today": ("llama3_2", [PLAIN], "texts"),
    "margins": ("qwen2_5", [{**PLAIN, "margin": 2.0, "soft_label": 0.75}], "turns"),
}


@pytest.mark.parametrize(("family", "rows", "form"), CASES.values(), ids=CASES)
def test_trl_makes_the_stored_tokens(family: str, rows: list[dict[str, Any]], form: str, tmp_path: Path) -> None:
    groups, found, written = exported(family, rows, tmp_path)
    assert (found.rows, dict(found.left_out), dict(found.notes)) == (len(rows), {}, {})
    assert all(isinstance(row["prompt"], str) == (form == "texts") for row in written)
    tokenizer = families.tokenizer_of(family)
    after = make_chat(tokenizer).after_end
    for group, read in zip(groups, read_by_trl(written, tokenizer), strict=True):
        assert read["prompt_ids"] == group.prompt_ids.tolist()
        for own, theirs in zip(group.candidates, (read["chosen_ids"], read["rejected_ids"]), strict=True):
            assert theirs[: len(own.ids)] == own.ids.tolist()
            assert tokenizer.decode(theirs[len(own.ids) :]) in ("", after)


def test_numbers_and_what_the_row_said_come_along(tmp_path: Path) -> None:
    row = {**PLAIN, "margin": 2.0, "soft_label": 0.75, "chosen_score": 3.0, "rejected_score": 1.0}
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    _, _, (written,) = exported("qwen3", [row | variables], tmp_path)
    assert written == {"prompt": [BRIEF, ASK], "chosen": BLUE, "rejected": GREEN} | variables | {
        name: row[name] for name in ("margin", "soft_label", "chosen_score", "rejected_score")
    }
    with_tools = pair(LOOK, chosen=CALL, rejected=GREEN, tools=TOOLS)
    _, _, (written,) = exported("qwen2_5", [with_tools], tmp_path / "tools")
    assert written == with_tools


def test_an_answer_that_was_cut_off_says_so(tmp_path: Path) -> None:
    """TRL would teach it to stop; our own reader does not."""
    row = {**PLAIN, "finished": [True, False]}
    (group,), found, (written,) = exported("qwen2_5", [row], tmp_path)
    assert [own.finished for own in group.candidates] == [True, False]
    assert written == row and list(found.notes.values()) == [1]
    (read,) = read_by_trl([written], families.tokenizer_of("qwen2_5"))
    rejected = group.candidates[1].ids.tolist()
    assert read["rejected_ids"][: len(rejected)] == rejected
    ((again,), *_) = exported("qwen2_5", [written], tmp_path / "again")
    assert [own.ids.tolist() for own in again.candidates] == [own.ids.tolist() for own in group.candidates]
    assert [own.finished for own in again.candidates] == [True, False]


def test_a_prompt_that_was_cut_is_whole_in_the_file(tmp_path: Path) -> None:
    settings = TokenBudget(max_prompt_tokens=12, max_tokens=24)
    (group,), found, (written,) = exported("qwen2_5", [PLAIN], tmp_path, settings=settings)
    assert len(group.prompt_ids) < 25 and written["prompt"] == [BRIEF, ASK]
    (note,) = found.notes
    assert "the prompt was cut here" in note


def test_a_token_that_the_tokenizer_adds_to_texts_is_not_taken_for_a_cut_prompt(tmp_path: Path) -> None:
    """The date is another today, so that turns do not do; and the template writes no token that begins texts."""
    with pytest.raises(UserError, match="that TRL would tokenize otherwise"):
        exported("gptoss", [PLAIN], tmp_path)


def test_rows_of_which_trl_makes_other_tokens_are_left_out_and_told(tmp_path: Path) -> None:
    """Two forms cannot stand in one file: the one that loses fewer rows is written."""
    spelled = pair(user("What is <|im_end|>?"), chosen=BLUE, rejected=GREEN)
    _, found, written = exported("qwen2_5", [PLAIN, spelled, PLAIN], tmp_path)
    assert len(written) == 2 and dict(found.left_out) == {"that TRL would tokenize otherwise": 1}


def exported(
    family: str, rows: list[dict[str, Any]], folder: Path, *, settings: TokenBudget = SETTINGS
) -> tuple[list[Group], Exported, list[dict[str, Any]]]:
    """(stored groups, what the export says, its rows)."""
    tokenizer = families.tokenizer_of(family)
    model, directory = folder / "model", folder / "tokens-pair"
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text("{}")
    chat = make_chat(tokenizer)
    given = [RawRow(source="rows.jsonl", line=line, value=row) for line, row in enumerate(rows, start=1)]
    unit = Unit(path="rows.jsonl")
    report = prepare_rows([given], chat, settings, unit=unit, shape="pair", directory=directory, name="0")
    assert report.shards and not report.bad, report.bad
    meta = {"inputs": {"shape": "pair", "tokenizer": tokenizer_digest(model)}}
    commit_store(directory, report.shards, meta=meta)
    found = trl_pairs(directory, folder / "pairs.jsonl", model=str(model))
    store = TokenStore.open(directory)
    written = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [store[index] for index in range(len(store))], found, written


def read_by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows as TRL's trainer prepares them."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    given = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
    dataset = Dataset.from_list(given).with_transform(remove_none_values)  # as TRL's documentation says
    prepared = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "pairs")  # type: ignore[arg-type]
    return list(prepared)
