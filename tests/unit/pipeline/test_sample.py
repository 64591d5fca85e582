"""Completions of several models side by side: equal noise, the prompts of a file, or a chat."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import save_tiny

from rayalign.errors import UserError
from rayalign.rollout.base import SamplingParams
from rayalign.verbs.sample import SampledModel, sample

PARAMS = SamplingParams(max_new_tokens=6, num_samples=2, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def test_equal_models_say_the_same_and_other_seeds_do_not(model: Path) -> None:
    speaker = SampledModel.load(str(model))
    prompts = ["hello", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                         {"role": "user", "content": "c"})]  # fmt: skip
    first = speaker.answers(prompts, PARAMS)
    assert [len(own) for own in first] == [2, 2]
    assert SampledModel.load(str(model)).answers(prompts, PARAMS) == first
    assert speaker.answers(prompts, replace(PARAMS, seed=4)) != first
    assert first[0][0] != first[0][1]


def test_a_table_per_prompt(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("first [bold]", "second")))
    printed = io.StringIO()
    sample([str(model), str(model)], file, PARAMS, interactive=False, console=Console(file=printed, width=200))
    text = printed.getvalue()
    assert "first [bold]" in text and "second" in text  # a prompt is no markup
    assert text.count(str(model)[:40]) == 4
    columns = [line.split("│")[1:3] for line in text.splitlines() if line.startswith("│")]
    assert len(columns) >= 4 and all(left == right for left, right in columns)


def test_a_chat_goes_on_until_the_input_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hi", "", "and then?"])

    def answer(prompt: str = "") -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    printed = io.StringIO()
    sample([str(model)], None, PARAMS, interactive=True, console=Console(file=printed, width=200))
    assert printed.getvalue().count(f"{model}: ") == 2


def test_what_cannot_be_sampled_is_refused(model: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match="name a file of prompts with --prompts, or write -i"):
        sample([str(model)], None, PARAMS, interactive=False, console=console)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="the file is empty"):
        sample([str(model)], empty, PARAMS, interactive=False, console=console)
    with pytest.raises(UserError, match="there is no directory"):
        sample([str(tmp_path / "nowhere")], empty, PARAMS, interactive=False, console=console)
