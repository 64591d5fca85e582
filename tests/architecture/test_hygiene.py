"""What must never be committed, whatever the room."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAX_BYTES = 500_000
MAX_LINES = 400
# Accounts of the images that clusters run are no one's machine.
MACHINE_PATH = re.compile(r"(?<![\w.*}])/(?:(?:work|root|farm)/|home/(?!ray/|ubuntu/))")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|/opt/(?:wheels|pypi)")


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--", *patterns]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [REPOSITORY / name for name in listing.split("\0") if name]
    return [file for file in files if file.exists()]


def matches(pattern: re.Pattern[str]) -> list[str]:
    """``file:line: text`` of every tracked line that matches; this file, which holds the patterns, is left out."""
    found = []
    for file in tracked():
        if file == Path(__file__):
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}")
    return found


def banned_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of every call that executes what it reads, or hands control to whoever wrote a repository."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        literal = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if called == "torch.load" and literal.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if called == "yaml.load":
            yield node.lineno, "yaml.load instead of yaml.safe_load"
        if literal.get("shell") is True:
            yield node.lineno, "shell=True"
        if literal.get("trust_remote_code") is True:
            yield node.lineno, "trust_remote_code=True"


def test_no_machine_paths() -> None:
    assert matches(MACHINE_PATH) == []


def test_no_registry_hosts() -> None:
    assert matches(REGISTRY) == []


def test_no_large_files() -> None:
    assert [file.name for file in tracked() if file.stat().st_size > MAX_BYTES] == []


def test_no_long_modules() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in tracked("rayalign/*.py")}
    assert {file.name: lines for file, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_no_banned_calls() -> None:
    files = [file for file in tracked("*.py") if file != Path(__file__)]
    found = [(file.name, line, reason) for file in files for line, reason in banned_calls(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True)", []),
        ("yaml.load(text, Loader=yaml.SafeLoader)", ["yaml.load instead of yaml.safe_load"]),
        ("yaml.safe_load(text)", []),
        ("subprocess.run(command, shell=True)", ["shell=True"]),
        ("subprocess.run(command, shell=False)", []),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("AutoModel.from_pretrained(name, trust_remote_code=config.trust_remote_code)", []),
    ],
)
def test_banned_calls_are_seen(source: str, reasons: list[str]) -> None:
    assert [reason for _, reason in banned_calls(source)] == reasons


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cp /work/x y", True),
        ("see /root/.cache", True),
        ("/home/someone/data", True),
        ("/home/ray/anaconda3", False),
        ("examples/work/out", False),
        ("$HOME/work/out", False),
    ],
)
def test_machine_paths_are_seen(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == found
