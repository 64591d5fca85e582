"""The support desk's rows: seeds, columns, and the token sequence that its template makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.make_model import FOLDER, write_model
from lab.world import pairs, prompts, reference_rows, sft_rows, vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_a_seed_fixes_every_stream_and_a_longer_one_begins_with_the_shorter() -> None:
    for rows in (sft_rows, reference_rows, pairs):
        assert rows(5, 30) == rows(5, 60)[:30]
        assert rows(5, 30) != rows(6, 30)
    assert prompts(5, 30, "shop") == prompts(5, 60, "shop")[:30]


def test_streams_share_no_prompts() -> None:
    streams = [
        sft_rows(0, 200),
        reference_rows(0, 200),
        pairs(0, 200),
        prompts(0, 200, "shop"),
        prompts(0, 200, "shop", split="eval"),
        prompts(1, 200, "shop"),
    ]
    texts = [row["prompt"][0]["content"] for stream in streams for row in stream]
    assert len(set(texts)) > 0.99 * len(texts)  # short messages may recur by chance


def test_columns_and_families() -> None:
    for index, row in enumerate(sft_rows(0, 10)):
        assert list(row) == ["prompt", "completion"]
        verb = "booked" if index % 2 else "bought"
        assert row["prompt"][0]["role"] == "user" and f"i {verb} a" in row["prompt"][0]["content"]
        assert row["completion"][0]["role"] == "assistant"
    assert list(pairs(0, 1)[0]) == ["prompt", "chosen", "rejected"]
    assert all("i booked a" in row["prompt"][0]["content"] for row in prompts(0, 10, "travel"))


def test_the_template_makes_bos_prompt_reply_mark_reply_eos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    row = sft_rows(0, 1)[0]
    prompt, reply = row["prompt"][0]["content"], row["completion"][0]["content"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(whole) == ["<bos>", *prompt.split(), "<reply>", *reply.split(), "<eos>"]
    prefix = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prefix)] == prefix and tokenizer.convert_ids_to_tokens(prefix[-1]) == "<reply>"
    assert tokenizer.decode(whole[len(prefix) :], skip_special_tokens=True) == reply


def test_vocabulary_and_parameters() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    specials = ["<pad>", "<bos>", "<reply>", "<eos>", "<unk>"]
    assert tokenizer.convert_ids_to_tokens(range(297)) == [*specials, *vocabulary()]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))
    assert sum(parameter.numel() for parameter in model.parameters()) == 250_176
    assert model.config.head_dim == 32 and model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_the_committed_model_folder_is_what_its_script_writes(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    assert _without_version((tmp_path / name).read_text()) == _without_version((FOLDER / name).read_text())


def _without_version(text: str) -> list[str]:
    return [line for line in text.splitlines() if '"transformers_version"' not in line]
