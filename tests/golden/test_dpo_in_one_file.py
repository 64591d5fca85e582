"""The loop that is written out in one file and the engine give the same losses on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path

import dpo_in_one_file as one_file
import pytest
from lab.world import pairs as lab_pairs
from tiny_runs import CPU, Scenario, objective, store, train_alone, train_spec
from transformers import AutoModelForCausalLM

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.engine.metrics import read_metrics
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.tokenizers import load_tokenizer

STEPS = 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The lab's model with weights."""
    loaded = load_policy(ModelSpec(config=ModelConfig(name=str(one_file.LAB_MODEL), from_scratch=True)), device=CPU)
    save_pretrained(*loaded, tmp_path / "model")
    return tmp_path / "model"


def test_losses_are_the_engines(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in lab_pairs(0, 40)))
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "one", "--steps", STEPS]
    arguments += [
        "--groups-per-step",
        8,
        "--groups-per-micro-batch",
        3,
        "--lr",
        3e-4,
        "--max-grad-norm",
        0.5,
        "--beta",
        0.03,
    ]
    # A small β, since float32 log-probs of whole replies are themselves exact to 1e-5 nats only.
    losses = one_file.main(one_file.parse([str(argument) for argument in arguments]))

    settings = TokenBudget(max_prompt_tokens=128, max_tokens=256)
    rows = next(read_chunks(Unit(path=str(data))))
    outcomes = rows_to_groups(rows, make_chat(load_tokenizer(model)), settings)
    groups = [outcome.group for outcome in outcomes if isinstance(outcome, Tokenized)]
    assert len(groups) == 40
    scenario = Scenario(
        model=model,
        streams=(store(tmp_path / "store", groups, reference=model, groups_per_step=8),),
        objectives=(objective("dpo", beta=0.03),),
        tokens_per_micro_batch=1024,
        row_tokens=256,
    )
    spec = train_spec(
        tmp_path / "run",
        scenario,
        optim={"lr": 3e-4, "weight_decay": 0.0, "max_grad_norm": 0.5},
        steps=STEPS,
        check_initial_logratio=True,
    )
    final = train_alone(spec, scenario)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert losses == pytest.approx([row["loss"] for row in rows], abs=1e-6)
    assert losses[-1] < losses[0] - 0.05
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "one", final))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 0.1 * 3e-4


@pytest.mark.slow
def test_runs_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    (loss,) = one_file.main(one_file.parse(["--steps", "1", "--groups-per-step", "4"]))
    assert loss == pytest.approx(0.693147, abs=1e-5)
    assert "512 pairs; 0 rows cannot be used" in capsys.readouterr().out
