"""Secrets in a configuration: refused, or redacted, and in no message."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.config import load_run
from rayalign.config.dump import redacted_setting
from rayalign.errors import UserError

RUN = "model: {name: m}\ndata: {train: [pairs.jsonl]}\nmethod: {name: dpo}\n"
SECRET = "hf_Planted0Secret"


def refusal(folder: Path, *settings: str) -> str:
    path = folder / "run.yaml"
    path.write_text(RUN)
    with pytest.raises(UserError) as error:
        load_run(path, settings)
    return str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        f"https://me:{SECRET}@host/pairs.jsonl",
        f"https://{SECRET}@huggingface.co/datasets/x",
        f"https://bucket.s3.amazonaws.com/pairs.jsonl?X-Amz-Date=1&X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/pairs.jsonl?sv=1&sig={SECRET}",
        f"s3://key:{SECRET}@bucket/pairs.jsonl",
        f"gs://bucket/pairs.jsonl?access_token={SECRET}",
    ],
)
@pytest.mark.parametrize("field", ["data.train", "model.name", "storage_path"])
def test_addresses_with_secrets_are_refused(tmp_path: Path, field: str, uri: str) -> None:
    message = refusal(tmp_path, f"{field}={uri}")
    assert "give credentials by the environment" in message and SECRET not in message


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/pairs.jsonl",
        "abfs://container@account.dfs.core.windows.net/pairs.jsonl",
        "https://host/pairs.jsonl?version=2",
        "https://host/a@b/pairs.jsonl",
    ],
)
def test_other_addresses_are_not(tmp_path: Path, uri: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    assert load_run(tmp_path / "run.yaml", [f"data.train={uri}"]).data.train[0].path == uri


def test_a_key_in_place_of_its_variable_is_refused(tmp_path: Path) -> None:
    judge = "{name: llm, model: m, base_url: 'https://host/v1', api_key_env: sk-live-Planted}"
    message = refusal(tmp_path, f"evaluate={{prompts: p.jsonl, scorers: [{judge}]}}")
    assert "not the name of an environment variable" in message and "Planted" not in message


@pytest.mark.parametrize(
    ("setting", "recorded"),
    [
        ("optim.lr=1e-6", "optim.lr=1e-6"),
        ("scorer.arguments.api_key=sk-1", "scorer.arguments.api_key=(redacted)"),
        (
            "scorer={name: rule, function: 'a:b', arguments: {hf_token: t}}",
            "scorer={arguments: {hf_token: (redacted)}, function: 'a:b', name: rule}",
        ),
        ("data.max_tokens=5", "data.max_tokens=5"),
        ("broken={", "broken={"),
    ],
)
def test_a_recorded_command_line(setting: str, recorded: str) -> None:
    assert redacted_setting(setting) == recorded
