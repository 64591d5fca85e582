"""What a command is given by mistake ends in exit code 2 and a sentence that names it; no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from synthetic_comparison import few_cells
from workspaces import rayalign

from rayalign.errors import blocked_path_error
from rayalign.report.points import ComparisonRecord, save_comparison

FILES = {
    "file": b"x",
    "binary.jsonl": bytes(range(256)),
    "pairs.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "empty/.keep": b"",
    "model/config.json": b"{}",
    "cut/run.json": b"{broken",
    "list/run.json": b"[]",
    "list/metrics.jsonl": b"garbage\n{\n[1]\n",
    "fields/comparison.json": b"{}",
    "bytes/comparison.json": b"\xff\xfe",
    "notes/comparison.json": b"[1]",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("init nope", "'nope'"),
        ("train missing.yaml", "missing.yaml: cannot be read: No such file"),
        ("train empty", "empty: cannot be read: Is a directory"),
        ("train binary.jsonl", "binary.jsonl: is not text in UTF-8"),
        ("train pairs.jsonl optim.lr", "optim.lr"),
        ("train model.name=model", "method: missing"),
        ("train run.yaml --lr 1e-6", "--lr: there is no such option (--help lists them); write optim.lr=1e-6"),
        ("train --learning-rate=1e-6", "write optim.lr=1e-6"),
        ("train run.yaml --optim.lr 1e-6", "write optim.lr=1e-6"),
        ("check pairs.jsonl --max-samples 0", "--max-samples: 0 must be at least 1"),
        ("check pairs.jsonl --method=", "method"),
        ("compare run.yaml --dryrun", "--dryrun: there is no such option (--help lists them); a setting is key=value"),
        ("compare missing.yaml", "missing.yaml: cannot be read"),
        ("compare empty", "empty: cannot be read"),
        ("compare --pilot x missing.yaml", "--dry-run"),
        ("generate", "model: missing"),
        ("generate --pairs --best x=1", "--pairs and --best"),
        ("score missing.yaml", "missing.yaml: cannot be read"),
        ("evaluate missing.yaml", "missing.yaml: cannot be read"),
        ("evaluate --json", "--json goes with --pairs"),
        ("evaluate --pairs pairs.jsonl", "takes one reward model"),
        ("sample model", "--prompts"),
        ("check pairs.jsonl --format nope", "--format: 'nope' is none of auto | preference"),
        ("report missing", "missing holds no comparison.json"),
        ("report file", "file holds no comparison.json"),
        ("report empty", "empty holds no comparison.json"),
        ("report fields", "fields/comparison.json: name: Field required"),
        ("report bytes", "bytes/comparison.json is no text in UTF-8"),
        ("report notes", "notes/comparison.json"),
        ("report fields bytes", "--out"),
        ("status missing", "missing holds no run"),
        ("status file", "file holds no run"),
        ("status empty", "empty holds no run"),
        ("export alpaca_eval missing", "missing holds no evaluation"),
        ("export alpaca_eval list", "list holds no evaluation"),
        ("export trl_pairs missing", "missing is no committed store"),
        ("export trl_pairs file", "file is no committed store"),
        ("export model_card missing", "missing belongs to no run"),
        ("export model_card cut", "cut/final holds no model"),
        ("artifacts ls missing", "missing holds no artifacts"),
        ("artifacts ls file", "file holds no artifacts"),
        ("artifacts gc empty --unused-for soon", "empty holds no artifacts"),
    ],
)
def test_what_is_not_there(command: str, told: str) -> None:
    done = rayalign(*command.split())
    assert done.code == 2
    assert told in done.printed
    assert done.printed.startswith("error: ")
    assert "Traceback" not in done.printed


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("sample model --prompts pairs.jsonl -n 0", "-n"),
        ("sample model --prompts pairs.jsonl --temperature -1", "--temperature"),
        ("sample model --prompts pairs.jsonl --max-new-tokens 0", "--max-new-tokens"),
        ("check pairs.jsonl --max-bad-fraction 5", "--max-bad-fraction"),
        ("evaluate model --pairs pairs.jsonl --max-tokens 0", "--max-tokens"),
    ],
)
def test_numbers_out_of_range(command: str, option: str) -> None:
    done = rayalign(*command.split())
    assert (done.code, f"Invalid value for '{option}'" in done.printed, "Traceback" in done.printed) == (2, True, False)


@pytest.mark.usefixtures("folder")
def test_damaged_runs_are_listed() -> None:
    done = rayalign("status", ".")
    assert done.code == 0
    assert ("cut" in done.printed, "list" in done.printed) == (True, True)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("place", "told"), [("~nobody-here/runs", "leads nowhere"), ("file", "broken")])
def test_doctor_says_what_is_wrong_with_the_storage(place: str, told: str) -> None:
    done = rayalign("doctor", "--json", "--storage-path", place)
    assert done.code == 1
    assert told in done.printed


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("file", "file/report: Not a directory: a file is where a folder is expected"),
        ("taken", "taken/report/results.json: Is a directory: a folder is where a file is expected"),
    ],
)
def test_a_report_that_cannot_be_written(folder: Path, out: str, told: str) -> None:
    save_comparison(ComparisonRecord.model_validate(few_cells()), folder / "comparison")
    (folder / "taken" / "report" / "results.json").mkdir(parents=True)
    done = rayalign("report", "comparison", "--out", out)
    assert (done.code, told in done.printed, "Traceback" in done.printed) == (2, True, False), done.printed


def test_a_read_only_file_system_is_a_sentence() -> None:
    told = blocked_path_error(OSError(errno.EROFS, os.strerror(errno.EROFS), "/mnt/runs/x"))
    assert str(told) == (
        "/mnt/runs/x: Read-only file system: mount that file system for writing, or name another place"
    )
    assert "give a shorter name" in str(
        blocked_path_error(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300))
    )
    assert blocked_path_error(OSError(errno.EROFS, "of no path")) is None
    assert blocked_path_error(FileNotFoundError(errno.ENOENT, "a bug", "x")) is None
    assert blocked_path_error(ValueError("x")) is None
