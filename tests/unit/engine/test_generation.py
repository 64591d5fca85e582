"""What a model's folder says of generating: contradictory files are mended, and every end token is known."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import save_tiny
from tiny_tokenizers import CHATML, byte_level
from transformers import GenerationConfig

from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.engine.model.generation import FILE, end_ids
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


MENDED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sampling settings without sampling": (
        {"eos_token_id": 4, "temperature": 0.6, "top_p": 0.9, "do_sample": False},
        {"eos_token_id": 4, "temperature": 0.6, "top_p": 0.9, "do_sample": True},
        "do_sample is taken for true",
    ),
    "nearly greedy, as Qwen-VL writes it": (
        {"temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.05},
        {"temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.05, "do_sample": True},
        "do_sample is taken for true",
    ),
    "no padding": ({"eos_token_id": 3, "pad_token_id": -1}, {"eos_token_id": 3}, "ids below 0 are left out"),
    "beams without beams": ({"eos_token_id": 2, "early_stopping": True}, {"eos_token_id": 2}, "only eos_token_id"),
    "a cache that is none": ({"eos_token_id": 2, "cache_implementation": "foo"}, {"eos_token_id": 2}, "only eos_to"),
    "several answers, greedily": ({"num_return_sequences": 3}, {}, "only none are kept"),
}  # fmt: skip


@pytest.mark.parametrize("case", MENDED)
def test_a_contradictory_file_is_mended_when_the_model_is_loaded(
    case: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, expected, told = MENDED[case]
    directory = shutil.copytree(llama, tmp_path / "model")
    (directory / FILE).write_text(json.dumps(given))
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    assert told in caplog.text and str(directory / FILE) in caplog.text
    save_pretrained(model, tokenizer, tmp_path / "final")
    found = json.loads((tmp_path / "final" / FILE).read_text())
    assert {name: value for name, value in found.items() if name != "transformers_version"} == expected


def test_a_good_file_stays_as_it_is(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    given = {"eos_token_id": [4, 1], "temperature": 0.6, "do_sample": True, "max_new_tokens": 7}
    (directory / FILE).write_text(json.dumps(given))
    model, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    save_pretrained(model, tokenizer, tmp_path / "final")
    assert given.items() <= json.loads((tmp_path / "final" / FILE).read_text()).items()
    assert caplog.text == ""
    save_pretrained(model, tokenizer, tmp_path / "ended", stop_ids=(4, 1, 9))
    assert GenerationConfig.from_pretrained(tmp_path / "ended").eos_token_id == [4, 1, 9]


def test_a_file_that_is_no_json_is_named(llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    (directory / FILE).write_text('{"eos_token_id": ')
    with pytest.raises(UserError, match=r"generation_config.json is not valid JSON"):
        load_policy(ModelSpec(config=ModelConfig(name=str(directory))))


def test_every_token_that_ends_a_response(llama: Path, tmp_path: Path) -> None:
    """<|im_end|> ends a turn (4), </s> is the tokenizer's (1), and files name others; unknown ones are left out."""
    chat = make_chat(byte_level(template=CHATML))
    assert chat.end_id == 4 and chat.tokenizer.eos_token_id == 1
    directory = shutil.copytree(llama, tmp_path / "model")
    (directory / FILE).unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert end_ids(directory, chat) == (4, 1)
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 8]}))
    assert end_ids(directory, chat) == (4, 1, 8)
    (directory / FILE).write_text(json.dumps({"eos_token_id": [14, 4, 100_000]}))
    assert end_ids(directory, chat) == (4, 1, 14)
    assert end_ids(directory, chat, ["<|eot_id|>"]) == (4, 8, 1, 14)
    with pytest.raises(UserError, match=r"data.stop: 'The sky' is \d+ tokens"):
        end_ids(directory, chat, ["The sky"])
