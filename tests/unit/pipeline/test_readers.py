"""Models that a run cannot use are refused before anything starts; what it will save is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from causal_zoo import save_animal
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tiny_runs import save_tiny, synthetic_groups
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForCausalLM

from rayalign.cli import main
from rayalign.config import load_run
from rayalign.config.run import RunConfig
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.engine.model.pretrained import save_pretrained
from rayalign.errors import UserError
from rayalign.judge.measure import Prompt
from rayalign.run.model import stop_ids
from rayalign.run.readers import (
    export_facts,
    export_sentences,
    refuse_long_questions,
    refuse_unanswerable,
    refuse_unreadable,
    refuse_unusable_models,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", eos_token_id=1)


RULE = {"name": "rule", "function": "rules:length"}
PAIRS: dict[str, Any] = {
    "name": "run",
    "data": {"train": ["pairs.jsonl"], "max_prompt_tokens": 64, "max_tokens": 128},
    "method": {"name": "dpo"},
    "optim": {"steps": 1, "lr": 1e-4},
}
DRAWN: dict[str, Any] = {
    **PAIRS,
    "data_policy": {"name": "on_policy", "refresh_every": 1},
    "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 30},
    "label": {"name": "best_worst"},
    "scorer": RULE,
}
PPO: dict[str, Any] = {**{key: own for key, own in DRAWN.items() if key != "label"}, "method": {"name": "ppo"}}
MEASURED: dict[str, Any] = {**PAIRS, "evaluate": {"prompts": ["asks.jsonl"], "scorers": [RULE], "every": 1}}


def configured(start: Path, base: dict[str, Any] = PAIRS, **blocks: Any) -> RunConfig:
    """A run that begins at ``start``; what ``model`` itself says may be among ``blocks``."""
    Path("rules.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    Path("asks.jsonl").write_text('{"prompt": "Why?"}\n')
    facts = {**base, **blocks, "model": {"name": str(start), **blocks.get("model", {})}}
    Path("run.yaml").write_text(yaml.safe_dump(facts))
    return load_run(Path("run.yaml"))


def changed(model: Path, directory: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a model with other tensors, or without those that are None."""
    shutil.copytree(model, directory)
    every: dict[str, torch.Tensor | None] = {**load_file(directory / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in every.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("command", "base", "field"),
    [
        ("train", PAIRS, "model.name"),
        ("train", PAIRS, "model.reference"),
        ("train", PPO, "critic.model"),
        ("generate", DRAWN, "model.name"),
        ("evaluate", MEASURED, "model.reference"),
    ],
)
def test_a_model_without_one_of_its_tensors_stops_a_command_before_ray_starts(
    command: str,
    base: dict[str, Any],
    field: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = changed(llama, tmp_path / "broken", **{"lm_head.weight": None, "model.norm.weight": None})
    block, _, key = field.partition(".")
    configured(llama, base, **{block: {key: str(broken)}})
    monkeypatch.setattr("sys.argv", ["rayalign", command, "run.yaml"])
    with pytest.raises(SystemExit) as left:
        main()
    told = " ".join(capsys.readouterr().err.split())
    assert (left.value.code, ray.is_initialized()) == (2, False)
    missing = "model.norm.weight" if field == "critic.model" else "lm_head.weight, model.norm.weight"
    assert f"error: {field}: {broken} lacks" in told and missing in told and "Traceback" not in told


def test_a_reference_must_read_the_policys_tokens(llama: Path, tmp_path: Path) -> None:
    """Its log-probs would be those of other texts."""
    tokenizer = byte_level(template=CHATML)
    tokenizer.add_tokens(["<extra>"])
    other = tmp_path / "other"
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, other)
    refuse_unusable_models(configured(llama, model={"reference": str(other)}))  # it reads all of the policy's
    with pytest.raises(UserError, match=r"model.reference: .* reads other tokens than the policy: 1 of .*'<extra>'"):
        refuse_unusable_models(configured(other, model={"reference": str(llama)}))


@pytest.mark.parametrize(
    ("rope", "message"),
    [({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "stretches dynamic RoPE"), (None, "is an adapter")],
)
def test_vllm_samples_no_other_model_than_the_one_trained(
    rope: dict[str, Any] | None, message: str, llama: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", rope_parameters=rope) if rope else adapter_of(llama, tmp_path / "adapter")
    run = configured(model, DRAWN, rollout={"engine": "vllm", "samples": 2, "max_new_tokens": 8})
    with pytest.raises(UserError, match=f"rollout.engine: vllm .*{message}|{message}.*write hf"):
        refuse_unusable_models(run)


def test_what_no_model_of_the_run_reads_is_refused_by_its_row(llama: Path, tmp_path: Path) -> None:
    """The policy reads it; its reference does not."""
    commit_store(tmp_path / "rows", [write_shard(tmp_path / "rows", "shard", synthetic_groups([2, 3]))], meta={})
    longest = max(
        len(group.prompt_ids) + max(len(own.ids) for own in group.candidates) for group in synthetic_groups([2, 3])
    )
    short = save_tiny(tmp_path / "short", max_position_embeddings=longest - 1)
    refuse_unreadable(tmp_path / "rows", configured(llama))
    with pytest.raises(
        UserError, match=rf"synthetic.jsonl:\d has {longest} tokens, .*short reads {longest - 1} \(max_pos"
    ):
        refuse_unreadable(tmp_path / "rows", configured(llama, model={"reference": str(short)}))
    drawing = configured(save_tiny(tmp_path / "tiny", max_position_embeddings=40), DRAWN)
    assert drawing.rollout is not None
    with pytest.raises(UserError, match=r"rollout.max_new_tokens are 30, more than the 40 that .*tiny reads"):
        refuse_unanswerable(tmp_path / "rows", drawing, drawing.rollout)
    evaluated = configured(tmp_path / "tiny", MEASURED).evaluated
    assert evaluated is not None
    with pytest.raises(UserError, match=r"evaluate.prompts: a prompt of 30 tokens and \d+ new ones .* context of 40"):
        refuse_long_questions((Prompt(prompt="Why?", ids=tuple(range(30))),), evaluated)


# What is saved


def adapter_of(base: Path, directory: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(directory)
    return directory


def test_of_a_plain_model_only_its_end_tokens_are_said(llama: Path) -> None:
    run = configured(llama)
    assert export_facts(run) == {"dtype": "float32", "end_tokens": ["<|im_end|>", "</s>"]}
    assert [*export_sentences(run)] == ["samples stop at <|im_end|>, </s>; training appends the first"]


def test_what_is_not_as_expected_is_said(llama: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(llama, half)
    weights = load_file(half / "model.safetensors")
    save_file({name: own.bfloat16() for name, own in weights.items()}, half / "model.safetensors", {"format": "pt"})
    (half / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    run = configured(half)
    assert stop_ids(run) == (4, 1, 0)
    assert [*export_sentences(run)] == [
        "final/ will be saved in bfloat16, as the model's own files are; checkpoints are float32",
        "samples stop at <|im_end|>, </s>, <s>; training appends the first",
    ]
    run = configured(half, model={"save_dtype": "float32"}, data={**PAIRS["data"], "stop": ["<s>", "<|im_end|>"]})
    assert stop_ids(run) == (0, 4, 1) and export_facts(run)["dtype"] == "float32"


def test_an_adapter_on_an_adapter_is_merged(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_of(llama, tmp_path / "adapter")
    facts = export_facts(configured(adapter, model={"lora": {"rank": 2}}))
    assert facts["base"] == f"{llama} with the adapter in {adapter} merged"
    assert facts["lora"].startswith("model.lora: an adapter on 14 linear layers (down_proj, gate_proj, k_proj")
    assert facts["adapter"].startswith("none: it would belong upon a model that is an adapter merged")


def test_experts_without_an_adapter_are_said(tmp_path: Path) -> None:
    model = save_animal(tmp_path / "moe", "mixtral")
    assert [*export_sentences(configured(model, model={"lora": {"rank": 2}}))][1:] == [
        "model.lora: an adapter on 8 linear layers (k_proj, o_proj, q_proj, v_proj); none on 4 tensors of fused "
        "experts (down_proj, gate_up_proj), which get one if model.lora.target_modules names them"
    ]
