"""Every run that the documentation trains moves its weights: here those that need no Ray to be followed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_runs import idle_runs
from lab.in_process import CPU, Workshop
from pages import PAGES, Block, blocks, copy_examples
from safetensors.torch import load_file

from rayalign.config import load_run
from rayalign.config.run import RunConfig
from rayalign.engine.model.pretrained import load_policy
from rayalign.run.model import model_spec


def trained() -> list[Any]:
    """(page, settings) of every command that trains a run and succeeds, each run once."""
    found: dict[tuple[Path, str], Any] = {}
    for page in PAGES:
        for block in blocks(page):
            for command in commands(block):
                words = shlex.split(command)[2:]
                if "strategy" not in command:
                    found.setdefault(
                        (page, words[0]), pytest.param(page, words, id=f"{page.stem}-{Path(words[0]).stem}")
                    )
    return list(found.values())


def commands(block: Block) -> list[str]:
    return [
        own
        for own in block.commands
        if block.is_run and "fails" not in block.marks and own.startswith("rayalign train")
    ]


def in_memory(run: RunConfig) -> bool:
    """Whether the workshop can train it: a language model, on one maker of rows."""
    [*sources] = run.data.train
    return len(sources) == 1 and sources[0].function is not None and run.method.record.trains == "policy"


@pytest.mark.parametrize(("page", "words"), trained())
def test_a_documented_run_moves_its_weights(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    for block in blocks(page):
        if "file" in block.marks:
            (tmp_path / block.marks["file"]).write_text(block.text, encoding="utf-8")
    path, *settings = words
    run = load_run(path, settings)
    if not in_memory(run):
        pytest.skip("needs files or a scalar head: the slow tests run its page's commands, and look at its steps too")
    final = Workshop(folder=tmp_path / "runs").train(run, run.name)
    before = dict(load_policy(model_spec(run), device=CPU)[0].named_parameters())
    after = load_file(final / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert len(moved) > len(after) / 2
    assert idle_runs(tmp_path / "runs") == []
