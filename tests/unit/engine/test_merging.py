"""Folders that hold an adapter: the model is what peft itself makes of base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_runs import Scenario, objective, save_tiny, store, synthetic_groups, train_alone, train_spec
from tiny_tokenizers import CHATML, byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rayalign.config import model as config
from rayalign.config.model import ModelConfig
from rayalign.engine.model.folder import model_digest
from rayalign.engine.model.loading import META
from rayalign.engine.model.pretrained import ModelSpec, load_policy, refuse_unusable, save_pretrained
from rayalign.engine.model.scalar import ScalarHead
from rayalign.errors import UserError

IDS = torch.arange(5, 40)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_tiny(folder / name, name) for name in ("llama", "llama_tied", "gpt2", "qwen3_moe")}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def draw(model: Any) -> None:
    """Weights for an adapter that does something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data.copy_(0.3 * torch.randn_like(parameter) if "magnitude" not in name else parameter * 1.3)


def adapter(base: Path, directory: Path, **settings: Any) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    draw(model)
    model.save_pretrained(directory)
    return directory


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "scaled by the root of the rank": ("llama", {"r": 4, "use_rslora": True, "target_modules": ["v_proj"]}),
    "DoRA": ("llama", {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}),
    "transposed": ("gpt2", {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "a bias": ("gpt2", {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "experts": ("qwen3_moe", {"r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "a head of its own": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a head that was tied": ("llama_tied", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied embedding": ("llama_tied", {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}),
    "a tied head": ("llama_tied", {"r": 2, "target_modules": ["lm_head"]}),
    "both, tied": ("llama_tied", {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "a few tokens": (
        "llama_tied", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 9]}}
    ),
}  # fmt: skip
TIED = ("both, tied", "a few tokens")
"""Kinds that leave embedding and head one tensor."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_what_peft_makes_of_it(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    family, settings = KINDS[kind]
    folder = adapter(bases[family], tmp_path / "adapter", **settings)
    base = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, folder))
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    model, tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(folder))))
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(bases[family]))
    assert (expected - before).abs().max() > 0.05
    assert torch.allclose(logits(model), expected, atol=5e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is (family == "gpt2" or kind in TIED)
    save_pretrained(model, tokenizer, tmp_path / "saved")
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)), expected, atol=5e-5
    )
    skeleton, _ = load_policy(ModelSpec(config=ModelConfig(name=str(folder))), place=META)
    assert [*skeleton.state_dict()] == [*model.state_dict()] and skeleton.config.to_dict() == model.config.to_dict()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.get_vocab() == byte_level(template=CHATML).get_vocab()  # the base's


def test_a_base_beside_its_adapter_is_not_looked_for_elsewhere(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(bases["llama"], shutil.copytree(bases["llama"], tmp_path / "both"), target_modules=["q_proj"])
    expected, _ = load_policy(ModelSpec(config=ModelConfig(name=str(folder))))
    rename(folder, base="/nowhere")
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(folder))))
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(
        logits(model), logits(load_policy(ModelSpec(config=ModelConfig(name=str(bases["llama"]))))[0])
    )


def rename(folder: Path, *, base: object) -> None:
    path = folder / "adapter_config.json"
    changes = {"base_model_name_or_path": base, "revision": "main"}  # of the base where it came from the Hub
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_relative_base_lies_beside_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapters" / "one", target_modules=["q_proj"])
    shutil.copytree(bases["llama"], tmp_path / "base")
    expected = logits(load_policy(ModelSpec(config=ModelConfig(name=str(folder))))[0])
    rename(folder, base="../../base")
    assert torch.equal(logits(load_policy(ModelSpec(config=ModelConfig(name=str(folder))))[0]), expected)
    digest = model_digest(folder)
    (tmp_path / "base" / "config.json").write_text((tmp_path / "base" / "config.json").read_text() + " ")
    assert model_digest(folder) != digest


def test_an_adapter_with_further_tokens_grows_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """As TRL saves one: tokenizer, embedding and head beside the adapter."""
    base = AutoModelForCausalLM.from_pretrained(bases["llama_tied"], dtype=torch.float32)
    tokenizer = byte_level(template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    kept = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, kept)
    draw(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, known = load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path / "adapter"))))
    assert loaded.get_input_embeddings().num_embeddings == len(known) == len(tokenizer)
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)


def test_a_reward_models_adapter_brings_its_head(bases: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    draw(model)
    model.save_pretrained(tmp_path / "adapter")
    spec = ModelSpec(config=ModelConfig(name=str(tmp_path / "adapter")), head=ScalarHead(), trained_head=True, seed=7)
    loaded, _ = load_policy(spec)
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(loaded.score.weight, head)


def test_adapters_on_single_experts(bases: dict[str, Path], tmp_path: Path) -> None:
    """As peft made them before transformers fused experts: W + (α / r) B A of each. Other scales are refused."""
    base, layers, names = bases["qwen3_moe"], {}, ("gate_proj", "up_proj", "down_proj")
    file = tmp_path / "merged" / "model.safetensors"
    shutil.copytree(base, file.parent)
    found = load_file(file)
    torch.manual_seed(0)
    for name in [name for name in found if ".experts." in name]:
        weight = found[name]
        A, B = 0.3 * torch.randn(3, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], 3)
        found[name] = weight + 5 / 3 * B @ A
        short = "base_model.model." + name.removesuffix(".weight")
        layers |= {f"{short}.lora_A.weight": A, f"{short}.lora_B.weight": B}
    save_file(found, file, metadata={"format": "pt"})
    folder = tmp_path / "adapter"
    LoraConfig(
        r=3, lora_alpha=5, target_modules=list(names), base_model_name_or_path=str(base), task_type="CAUSAL_LM"
    ).save_pretrained(folder)
    save_file(layers, folder / "adapter_model.safetensors")
    byte_level(template=CHATML).save_pretrained(folder)
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    expected = logits(AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32))
    torch.testing.assert_close(
        logits(load_policy(ModelSpec(config=ModelConfig(name=str(folder))))[0]), expected, atol=1e-5, rtol=0
    )
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    for setting in ({"use_rslora": True}, {"alpha_pattern": dict.fromkeys(names, 4)}):
        path.write_text(json.dumps({**saved, **setting}))
        with pytest.raises(
            UserError, match=rf"adapter on single experts with (use_rslora|{next(iter(setting))}), which"
        ):
            refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))


def test_what_is_no_adapter_of_this_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    rename(folder, base="/nowhere/model")
    with pytest.raises(UserError, match=r"no directory /nowhere/model.* is an adapter, and its adapter_config"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    rename(folder, base=5)
    with pytest.raises(UserError, match=r"adapter_config.json does not say base_model_name_or_path: write it there"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    rename(folder, base=str(bases["gpt2"]))
    with pytest.raises(UserError, match=r"peft cannot put the adapter in .* upon its base \(.*q_proj.*\)"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    rename(folder, base=str(bases["llama"]))
    file = folder / "adapter_model.safetensors"
    found = load_file(file)
    name = sorted(found)[0]
    save_file({other: tensor for other, tensor in found.items() if other != name}, file)
    with pytest.raises(UserError, match=r"does not fit its base: it lacks 1 tensors, such as .*lora_A"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    save_file({**found, name.replace("q_proj", "z_proj"): found[name].clone()}, file)
    with pytest.raises(UserError, match=r"holds 1 tensors without a place, such as .*z_proj"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    save_file({**found, name: torch.full_like(found[name], torch.nan)}, file)
    with pytest.raises(UserError, match=r"adapter holds weights that are no finite numbers, in 1 of its tensors: .*q_"):
        load_policy(ModelSpec(config=ModelConfig(name=str(folder))))
    configuration = folder / "adapter_config.json"
    configuration.write_text(json.dumps({**json.loads(configuration.read_text()), "megatron_config": {"a": 1}}))
    with pytest.raises(UserError, match=r"peft cannot put the adapter in .* \(ModuleNotFoundError: .*megatron"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds a pickled adapter"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(folder))))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_that_peft_can_merge(config: PeftConfig, bases: dict[str, Path], tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config)
    torch.manual_seed(1)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, tmp_path))
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path))))
    assert torch.allclose(
        logits(load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path))))[0]), expected, atol=2e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "an adapter with layer_replication, which cannot become a part"),
        ({"alora_invocation_tokens": [10, 11]}, "aLoRA does not support merging"),
    ],
)
def test_a_lora_that_is_no_sum_of_matrices(
    settings: dict[str, Any], message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", r=2, target_modules=["q_proj"], **settings)
    with pytest.raises(UserError, match=message):
        load_policy(ModelSpec(config=ModelConfig(name=str(folder))))


def test_an_adapter_upon_an_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    first = adapter(bases["llama"], tmp_path / "first", r=2, target_modules=["q_proj"])
    rename(shutil.copytree(first, tmp_path / "second"), base=str(first))
    with pytest.raises(UserError, match=r"second is an adapter whose base, .*first, is an adapter too: merge that one"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path / "second"))))


def test_a_prompt_that_was_learned_is_no_part_of_the_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"an adapter of type PROMPT_TUNING, which cannot become a part"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path))))


def test_a_run_begins_as_the_merged_model_and_saves_it_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    """With a new adapter: the reference is the merged model, and final/ what was trained upon it."""
    start = adapter(bases["llama"], tmp_path / "adapter", r=2, target_modules=["q_proj"])
    pairs = store(tmp_path / "pairs", synthetic_groups([2] * 6), reference=start)
    lora = config.LoraConfig(rank=2, alpha=4.0)
    scenario = Scenario(model=start, streams=(pairs,), objectives=(objective("dpo"),), lr=1e-2, steps=2, lora=lora)
    spec = train_spec(tmp_path / "run", scenario, check_initial_logratio=True, export_adapter=False)
    final = train_alone(spec, scenario)
    trained, _ = load_policy(ModelSpec(config=ModelConfig(name=str(final))))
    merged, _ = load_policy(ModelSpec(config=ModelConfig(name=str(start))))
    assert not (final / "adapter").exists()
    assert (logits(trained) - logits(merged)).abs().max() > 1e-3
    assert sorted(load_file(final / "model.safetensors")) == sorted(load_file(bases["llama"] / "model.safetensors"))
