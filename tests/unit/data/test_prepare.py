"""What becomes of the rows of one chunk, and what is counted of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.records import RawRow
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize_rows import Shape, Unit, UnitReport, prepare_rows, read_chunks
from rayalign.errors import UserError

CHAT = make_chat(tiny.byte_level(template=tiny.CHATML))
TIE = {"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": 0}
PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def prepared(folder: Path, shape: Shape, *rows: dict[str, Any], **fields: Any) -> UnitReport:
    raw = [RawRow(source="f", line=line, value=row) for line, row in enumerate(rows, start=1)]
    unit = Unit(path="f.jsonl", **fields)
    return prepare_rows([raw], CHAT, TokenBudget(), unit=unit, shape=shape, directory=folder, name="0")


def test_every_row_is_good_bad_or_dropped_and_what_was_not_read_is_counted(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": 1, "mood": "good"}, {**TIE, "mood": "bad"}, {"prompt": "Q", "answer": "A"}, PAIR]
    report = prepared(tmp_path, "pair", *rows)
    assert (report.rows, report.bad, report.dropped, report.undecided) == (4, 1, 1, 1)
    assert report.shards and report.shards[0].groups == 2
    assert report.formats == {"preference": 2, "helpsteer_preference": 1, "prompt_only": 1}
    assert (report.unread, report.metadata) == ({"mood": 2, "answer": 1}, {"id": 1})
    assert "not read: answer" in report.bad_rows[0].reason


@pytest.mark.parametrize(
    ("shape", "undecided", "groups"),
    [("pair", 1, 0), ("ranking", 1, 0), ("labelled", 1, 0), ("group", 0, 1), ("prompt", 0, 1)],
)
def test_a_tie_is_left_out_where_preferences_are_learned(
    shape: Shape, undecided: int, groups: int, tmp_path: Path
) -> None:
    report = prepared(tmp_path, shape, TIE)
    assert report.undecided == report.dropped == undecided and not report.bad
    assert sum(shard.groups for shard in report.shards) == groups


def test_ranks_of_the_data_are_the_order_that_is_learned(tmp_path: Path) -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("B", 2), ("A", 1), ("C", 2), ("D", 4))]
    report = prepared(tmp_path, "ranking", {"prompt": "Q", "answers": answers})
    assert report.shards
    group = commit_store(tmp_path, report.shards, meta={})[0]
    assert group.per_candidate["rank"].tolist() == [0, 1, 1, 3]
    assert [CHAT.tokenizer.decode(own.ids[:1]) for own in group.candidates] == ["A", "B", "C", "D"]
    tied = [{"answer": text, "rank": 1} for text in "AB"]
    assert prepared(tmp_path / "tied", "ranking", {"prompt": "Q", "answers": tied}).undecided == 1


def test_the_better_answer_is_chosen_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{**TIE, "preference_strength": strength} for strength in (-2, 3)]
    report = prepared(tmp_path, "pair", *rows)
    assert report.shards
    store: TokenStore = commit_store(tmp_path, report.shards, meta={})
    chosen = [CHAT.tokenizer.decode(store[row].candidates[0].ids[:1]) for row in range(2)]
    assert chosen == ["A", "B"]


def test_columns_that_rows_have_are_noted(tmp_path: Path) -> None:
    report = prepared(tmp_path, "pair", {**PAIR, "functions": None}, columns={"tools": "functions", "system": "sytsem"})
    assert report.named == {"functions"}


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the chat template does not read enable_thinking; leave it out"):
        prepared(tmp_path, "pair", PAIR, template_kwargs={"enable_thinking": False})


def test_some_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(1_100)))
    chunks = list(read_chunks(Unit(path=str(path), first=5, last=1_050)))
    assert [len(chunk) for chunk in chunks] == [512, 512, 21]
    assert (chunks[0][0].line, chunks[-1][-1].line) == (6, 1_050)


def test_numbers_of_a_csv_file_stand_where_columns_names_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,liked,note\n1,2,true,3\n")
    unit = Unit(path=str(path), columns={"label": "liked"})
    [[row]] = read_chunks(unit)
    assert isinstance(row, RawRow)
    assert row.value == {"prompt": "1", "completion": "2", "liked": True, "note": "3"}
