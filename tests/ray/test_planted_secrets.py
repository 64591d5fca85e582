"""Secrets that a run needs are in nothing that it writes or prints: they are planted, and every byte is searched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from endpoints import KEY, Endpoint, serving
from workspaces import Finished, Workspace, rayalign

from rayalign.runtime.session import Session

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLANTED = {
    "HF_TOKEN": "hf_plantedInTheEnvironment",
    "WANDB_API_KEY": "wandbPlantedInTheEnvironment",
    "AWS_SECRET_ACCESS_KEY": "awsPlantedInTheEnvironment",
}
ARGUMENT, COMMAND = "sk-plantedInArguments", "sk-plantedInTheCommand"
SECRETS = (KEY, ARGUMENT, COMMAND, *PLANTED.values())
MODULE = """
import json
from pathlib import Path


def rows(api_key):
    for line in Path(__file__).with_name("few.jsonl").read_text().splitlines():
        yield json.loads(line)


def length(prompt, reply, hf_token="", password=""):
    return len(reply)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """Repeats the key that it was shown when it fails, as servers do."""
    with pytest.MonkeyPatch.context() as patch, serving(patch) as server:
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        server.answer = lambda question: f"Your key {KEY} is noted. Verdict: A"
        server.script = [{"error": f"Incorrect API key provided: {KEY}"}, 500]
        yield server


@pytest.fixture(scope="module")
def compared(endpoint: Endpoint, workspace: Workspace, session: Session) -> Finished:
    """A comparison of one cell, with a judge; the environment was set before Ray started its processes."""
    folder = workspace.folder
    (folder / "secretive.py").write_text(MODULE)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Why?", "Who?")))
    rows = [{"prompt": f"{number}?", "chosen": "Yes.", "rejected": "No, never."} for number in range(16)]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = yaml.safe_load(workspace.run("base").read_text()) | {
        "data": {"train": [{"function": "secretive.py:rows", "arguments": {"api_key": ARGUMENT}}], "max_tokens": 96}
        | {"max_prompt_tokens": 48},
        "optim": {"lr": 1e-2, "steps": 2, "groups_per_step": 8, "tokens_per_micro_batch": 2048},
        "track": ["tensorboard"],
        "evaluate": {
            "prompts": "prompts.jsonl",
            "scorers": [{"name": "rule", "function": "secretive.py:length", "arguments": {"password": ARGUMENT}}],
            "judge": {"name": "llm", "model": "careful", "base_url": endpoint.url, "api_key_env": "TEST_KEY"},
            "sampling": {"samples": 1, "max_new_tokens": 4},
            "max_missing_fraction": 1.0,
        },
    }
    base.pop("name")
    path = folder / "planted.yaml"
    path.write_text(yaml.safe_dump({"name": "planted", "base": base, "grid": {"method": ["dpo"]}}))
    scorer = f"[{{name: rule, function: 'secretive.py:length', arguments: {{hf_token: {COMMAND}}}}}]"
    return rayalign("compare", path, f"base.evaluate.scorers={scorer}")


def written(workspace: Workspace) -> list[Path]:
    return [path for path in workspace.storage.rglob("*") if path.is_file()]


def test_the_secrets_were_used(workspace: Workspace, endpoint: Endpoint, compared: Finished) -> None:
    assert compared.code == 0, compared.printed
    assert endpoint.keys == {f"Bearer {KEY}"}
    names = {path.name for path in written(workspace)}
    assert {"run.json", "metrics.jsonl", "rows.jsonl", "comparison.json", "results.json", "report.html"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_no_file_has_a_secret(workspace: Workspace, compared: Finished) -> None:
    leaks = {
        f"{path.relative_to(workspace.storage)}: {secret}"
        for path in written(workspace)
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    }
    assert leaks == set()


def test_nothing_printed_has_a_secret(compared: Finished) -> None:
    assert not [secret for secret in SECRETS if secret in compared.printed]


def test_the_configuration_is_recorded_without_them(workspace: Workspace, compared: Finished) -> None:
    (run,) = [json.loads(path.read_text()) for path in written(workspace) if path.name == "run.json"]
    (source,) = run["configuration"]["data"]["train"]
    assert source["arguments"] == {"api_key": "(redacted)"}
    results = json.loads((workspace.directory("planted") / "report" / "results.json").read_text())
    assert "hf_token: (redacted)" in json.dumps(results)
