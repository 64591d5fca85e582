from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
import torch
from bad_inputs import BAD_INPUTS, BadInput, line
from rich.console import Console
from tiny_runs import save_tiny

from rayalign.data.chat import make_chat
from rayalign.data.prepare import Unit, read_chunks
from rayalign.data.select import likelihood
from rayalign.data.tokenize import Tokenized, TokenizeSettings, rows_to_groups
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model import ModelSpec, load_tokenizer
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
    settings = TokenizeSettings(max_prompt_tokens=5, max_tokens=30)
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


def test_what_a_filter_would_keep_is_said(tmp_path: Path) -> None:
    """Ten rows in two files; the kept share is of both together, and the threshold is that of their own scores."""
    weights = str(save_tiny(tmp_path / "weights"))
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for number, path in enumerate(files):
        path.write_bytes(b"\n".join(line(prompt=f"Question {number} {n}?", chosen="x" * (n + 1)) for n in range(5)))
    options: dict[str, Any] = {"model": weights, "policy_logp_quantile": 0.7}
    code, printed, _ = run(tmp_path, *map(str, files), **options)
    assert code == 0 and f"filter 0.7 by {weights}: kept 3 of 10 rows, threshold −" in printed
    _, printed, _ = run(tmp_path, *map(str, files), as_json=True, **options)
    found = json.loads(printed)["filter"]
    chat = make_chat(load_tokenizer(Path(weights)))
    groups = [
        outcome.group
        for path in files
        for outcome in rows_to_groups(next(read_chunks(Unit(path=str(path)))), chat, TokenizeSettings())
        if isinstance(outcome, Tokenized)
    ]
    spec = ScoringSpec(model=ModelSpec(name=weights), tokens_per_micro_batch=4096, row_tokens=256)
    columns = FrozenModel(spec, torch.device("cpu")).token_logps(groups)
    scores = [
        likelihood(column, [candidate.num_predicted for candidate in group.candidates])
        for group, column in zip(groups, columns, strict=True)
    ]
    assert found.pop("threshold") == pytest.approx(sorted(scores)[-3], abs=1e-5)
    assert found == {"policy_logp_quantile": 0.7, "kept": 3, "of": 10, "unit": "rows"}


def test_a_filter_is_checked_with_a_model_and_a_quantile(tmp_path: Path, model: str) -> None:
    for options in ({"policy_logp_quantile": 0.5}, {"policy_logp_quantile": 1.0, "model": model}):
        with pytest.raises(UserError, match="lies between 0 and 1 and scores rows: name the model with --model"):
            run(tmp_path, "rows.jsonl", **options)
    bad, weights = tmp_path / "bad.jsonl", str(save_tiny(tmp_path / "weights"))
    bad.write_bytes(b"[]")
    _, printed, _ = run(tmp_path, str(bad), model=weights, policy_logp_quantile=0.5)
    assert "no row has a completion to score" in printed
