from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
from bad_inputs import BAD_INPUTS, BadInput, line
from rich.console import Console

from rayalign.data.tokenize import TokenizeSettings
from rayalign.errors import UserError
from rayalign.pipeline.check import check


def run(folder: Path, *files: str, **options: Any) -> tuple[int, str, list[dict[str, Any]]]:
    """(exit code, what was printed, the quarantine) of a check."""
    console = Console(file=io.StringIO(), width=200)
    quarantine = folder / "quarantine.jsonl"
    code = check(files, quarantine=quarantine, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    rows = [json.loads(text) for text in quarantine.read_text().splitlines()] if quarantine.exists() else []
    return code, console.file.getvalue(), rows


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.byte_level(template=tiny.CHATML).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs_are_quarantined_and_fail(case: BadInput, tmp_path: Path) -> None:
    path = tmp_path / f"rows{case.suffix}"
    path.write_bytes(case.content)
    code, printed, quarantine = run(tmp_path, str(path))
    assert code == (1 if case.bad else 0)
    assert [(row["line"], row["field"]) for row in quarantine] == [(number, field) for number, field, _ in case.bad]
    for row, (_, _, reason) in zip(quarantine, case.bad, strict=True):
        assert row["file"] == str(path) and reason in row["reason"]
    assert f"good │ {len(case.good)}" in " ".join(printed.split())


def test_threshold(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line()] * 9 + [b"[]"]))
    assert run(tmp_path, str(path), max_bad_fraction=0.1)[0] == 0
    assert run(tmp_path, str(path), max_bad_fraction=0.09)[0] == 1


def test_files_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path) -> None:
    good, empty, absent = (tmp_path / name for name in ("good.jsonl", "empty.jsonl", "absent.jsonl"))
    good.write_bytes(line())
    empty.write_bytes(b"")
    code, printed, _ = run(tmp_path, str(empty), str(absent), str(good))
    assert code == 2
    assert "empty.jsonl: the file is empty" in printed and "absent.jsonl: No such file" in printed
    assert "preference: 1" in printed


def test_json_report(tmp_path: Path, model: str) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_bytes(b"\n".join([line(), line(), line(prompt="Another?", chosen="x" * 3_000), b"{}"]))
    held_out.write_bytes(line(chosen="Red."))
    options = {"model": model, "eval_files": [str(held_out)], "as_json": True, "show": 2}
    code, printed, _ = run(tmp_path, str(train), **options)
    (report,) = json.loads(printed)["files"]
    assert code == 1
    facts = {
        name: report[name] for name in ("rows", "good", "bad", "duplicates", "in_eval", "long_responses", "no_end")
    }
    assert facts == dict(rows=4, good=3, bad=1, duplicates=1, in_eval=2, long_responses=1, no_end=1)
    assert report["lengths"]["response_tokens"]["max"] == 3_001


def test_rows_are_shown_as_tokens_in_the_colours_of_their_roles(tmp_path: Path, model: str) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "pqr"}, {"role": "assistant", "content": "xyz"}]
    path.write_text(json.dumps({"messages": [*turns, *turns]}) + "\n" + json.dumps({"messages": turns}))
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="standard")
    settings = TokenizeSettings(max_prompt_tokens=5, max_tokens=200)
    check([str(path)], model=model, show=1, settings=settings, quarantine=tmp_path / "q", console=console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "rows.jsonl:1" in printed and "rows.jsonl:2" not in printed
    red, cyan, green, yellow, bold_magenta = "\x1b[9;31m", "\x1b[36m", "\x1b[32m", "\x1b[33m", "\x1b[1;35m"
    assert f"{red}<|im_start|>" in printed
    assert f"{cyan}<|im_start|>" in printed
    assert f"{green}x" in printed
    assert f"{yellow}p" in printed
    assert printed.count(f"{bold_magenta}<|im_end|>") == 2


def test_show_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--show prints tokens: name the tokenizer's model with --model"):
        run(tmp_path, "rows.jsonl", show=1)


def test_model_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line())
    with pytest.raises(UserError, match="no tokenizer there"):
        run(tmp_path, str(tmp_path / "rows.jsonl"), model=str(tmp_path / "absent"))


def test_a_quarantine_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[]\n")
    code, printed, _ = run(tmp_path, str(path))
    assert code == 1
    console = Console(file=io.StringIO(), width=200)
    check([str(path)], quarantine=tmp_path / "absent" / "q.jsonl", console=console)
    assert isinstance(console.file, io.StringIO)
    assert "q.jsonl: bad rows cannot be written there: No such file or directory" in console.file.getvalue()
