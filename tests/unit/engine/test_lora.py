"""Adapters: the model that they start from, what is trained, and what becomes of them in files.

Those of reward models, too, whose head is trained whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_work import packed
from peft import PeftModel
from random_groups import random_groups
from safetensors.torch import load_file
from test_loop import Interrupted, checkpoint_of, interrupt_after, rows
from tiny_models import tiny
from tiny_runs import (
    Scenario,
    objective,
    prepared,
    run,
    same_optimizer,
    save_tiny,
    store,
    synthetic_groups,
    train_alone,
    train_spec,
)
from tiny_tokenizers import CHATML, byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.data.rank import rank_group
from rayalign.engine.model.forward import Policy, ScalarModel
from rayalign.engine.model.lora import ADAPTER, adapted_layers, adapter_off, state_with_adapter_merged
from rayalign.engine.model.parameter_dtype import base_names_in_bfloat16, hold_in_bfloat16
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.engine.model.scalar import ScalarHead
from rayalign.engine.strategy.base import make_strategy
from rayalign.errors import UserError

SINGLE = make_strategy("single", torch.device("cpu"))
LORA = LoraConfig(rank=3, alpha=5.0)
GROUPS = random_groups([2, 2, 2], vocabulary=300, seed=0)
STEPS = 6
FAMILIES = ("llama_tied", "gpt2", "qwen3_moe", "gemma3")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def scenario(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder, model = tmp_path_factory.mktemp("scenario"), models["llama_tied"]
    pairs = store(folder / "pairs", synthetic_groups([2] * 12), reference=model)
    return Scenario(model=model, streams=(pairs,), objectives=(objective("dpo"),), lr=1e-2, steps=STEPS, lora=LORA)


@pytest.fixture(scope="module")
def whole(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    train_alone(train_spec(directory, scenario, check_initial_logratio=True), scenario)
    return directory


@torch.no_grad()
def logps(model: PreTrainedModel) -> Tensor:
    return Policy(model)(packed(GROUPS)).token_logp


def trained(path: Path, lora: LoraConfig = LORA) -> PreTrainedModel:
    """A model with an adapter that does something."""
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(path), lora=lora)))
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(family: str, models: dict[str, Path]) -> None:
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(models[family]))))
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(models[family]), lora=LORA)))
    assert torch.equal(logps(model), logps(base))
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert not any("lm_head" in name for name in adapted_layers(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_compute_the_same_under_the_names_of_the_base(family: str, models: dict[str, Path]) -> None:
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(models[family]))))
    model = trained(models[family])
    expected = logps(model)
    assert (expected - logps(base)).abs().max() > 0.05
    state = state_with_adapter_merged(model, model.state_dict())
    assert list(state) == list(base.state_dict())
    base.load_state_dict(state)
    assert torch.allclose(logps(base), expected, atol=2e-5)


def test_the_merge_by_hand(models: dict[str, Path]) -> None:
    model = trained(models["llama_tied"], LoraConfig(rank=2, alpha=6.0, target_modules=("q_proj",)))
    layer = model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    state = state_with_adapter_merged(model, model.state_dict())
    assert A.shape[0] == 2 and len(adapted_layers(model)) == 2
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], layer.base_layer.weight + 3.0 * (B @ A))
    assert state["model.embed_tokens.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_a_base_that_is_held_in_bfloat16_changes_no_bit(
    family: str, saved: torch.dtype, models: dict[str, Path]
) -> None:
    """Under autocast, of files in bfloat16; of files in float32 nothing is rounded."""
    model = trained(models[family])
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(saved).float()
    policy, batch = Policy(model), packed(GROUPS)

    def outcome() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            token_logp = policy(batch).token_logp
        tuned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        weights = torch.linspace(-1, 1, len(token_logp))
        return [token_logp, *torch.autograd.grad(weights @ token_logp, tuned)]

    expected, exported = outcome(), state_with_adapter_merged(model, model.state_dict())
    before = sum(parameter.nbytes for parameter in policy.parameters())
    names = base_names_in_bfloat16(policy, torch.bfloat16)
    hold_in_bfloat16(policy, names)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outcome(), expected, strict=True))
    after = sum(parameter.nbytes for parameter in policy.parameters())
    experts = 0.99 if "moe" in family else 0.7  # fused ones stay
    assert (before == after and not names) if saved == torch.float32 else after < experts * before
    state = state_with_adapter_merged(model, model.state_dict())
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in exported.items()
    )


@torch.no_grad()
def test_off_is_the_model_before_the_adapter(models: dict[str, Path]) -> None:
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(models["gpt2"]))))
    model = trained(models["gpt2"])
    before = logps(model)
    with adapter_off(model):
        assert torch.equal(logps(model), logps(base))
    assert torch.equal(logps(model), before) and not torch.equal(before, logps(base))
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "proj"])
def test_layers_that_cannot_be_adapted_are_named(target: str, models: dict[str, Path]) -> None:
    lora = LORA.model_copy(update={"target_modules": ("q_proj", target)})
    with pytest.raises(UserError, match=f"model.lora.target_modules: {target}: .* blocks, which are down_proj, "):
        load_policy(ModelSpec(config=ModelConfig(name=str(models["llama_tied"]), lora=lora)))


def test_only_the_adapter_is_trained(scenario: Scenario) -> None:
    _, policy, optimizer = prepared(scenario, SINGLE)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for name, parameter in policy.named_parameters() if ".lora_" in name}
    trajectory = run(scenario)
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(scenario.model))))
    for name, weight in base.state_dict().items():
        held = trajectory.weights.get(name)
        held = trajectory.weights[name.replace(".weight", ".base_layer.weight")] if held is None else held
        assert torch.equal(held, weight)
    assert min(trajectory.loss) < trajectory.loss[0] - 0.02


@pytest.mark.parametrize(
    "method", ["kto", *(pytest.param(own, marks=pytest.mark.slow) for own in ("dpo", "exo_pref", "wpo"))]
)
def test_a_reference_in_place_is_the_one_in_the_data(method: str, scenario: Scenario, tmp_path: Path) -> None:
    """Every loss and weight to the bit: the same forward made the stored log-probs."""
    if method == "kto":
        from tiny_runs import labelled

        pairs = labelled(synthetic_groups([2] * 12))
        stored = store(tmp_path / "stored", pairs, reference=scenario.model)
        bare = store(tmp_path / "bare", pairs)
    else:
        stored = scenario.streams[0]
        bare = replace(stored, columns=((),))
    first = replace(scenario, streams=(stored,), objectives=(objective(method),))
    second = replace(first, streams=(bare,), reference_in_place=True)
    one, other = run(first), run(second)
    assert other.loss == pytest.approx(one.loss, abs=1e-6) and other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert all((one.weights[name] - other.weights[name]).abs().max() < 1e-4 for name in one.weights)
    assert one.loss[0] != one.loss[-1]


def test_dropout_is_of_gradients_only(scenario: Scenario) -> None:
    dropped = replace(scenario, lora=LORA.model_copy(update={"dropout": 0.5}))
    runner, policy, optimizer = prepared(dropped, SINGLE)
    for layer in adapted_layers(policy.model).values():
        layer.lora_B["default"].weight.data.normal_(std=0.3)
    assert torch.equal(logps(policy.model), logps(policy.model))
    torch.manual_seed(0)
    one, other = (policy(packed(GROUPS)).token_logp for _ in range(2))
    assert not torch.equal(one, other)


# Files


def test_final_is_the_merged_model_and_its_adapter(scenario: Scenario, whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    base = AutoModelForCausalLM.from_pretrained(scenario.model)
    names = set(load_file(scenario.model / "model.safetensors"))
    assert set(load_file(whole / "final" / "model.safetensors")) == names
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected, before = model(ids).logits, base(ids).logits
        adapted_model = PeftModel.from_pretrained(base, whole / "final" / ADAPTER)
        assert torch.allclose(adapted_model(ids).logits, expected, atol=2e-5)
    assert (expected - before).abs().max() > 1e-2
    assert adapted_model.peft_config["default"].r == 3
    assert model.generation_config.eos_token_id == [4]


def test_an_adapter_of_transposed_layers_loads_in_peft(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = store(tmp_path / "pairs", synthetic_groups([2] * 12), reference=models["gpt2"])
    scenario = Scenario(
        model=models["gpt2"], streams=(pairs,), objectives=(objective("dpo"),), lr=1e-2, steps=2, lora=LORA
    )
    final = train_alone(train_spec(tmp_path / "run", scenario), scenario)
    base = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(final)(ids).logits
        assert torch.allclose(PeftModel.from_pretrained(base, final / ADAPTER)(ids).logits, expected, atol=2e-5)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_resume_is_exact(dropout: float, scenario: Scenario, tmp_path: Path) -> None:
    dropped = replace(scenario, lora=LORA.model_copy(update={"dropout": dropout}))
    straight, interrupted = (train_spec(tmp_path / name, dropped) for name in ("straight", "interrupted"))
    train_alone(straight, dropped)
    with pytest.raises(Interrupted):
        train_alone(interrupted, dropped, on_step=interrupt_after(3))
    train_alone(interrupted, dropped)
    assert rows(interrupted.directory) == rows(straight.directory)
    for file in (Path("model.safetensors"), Path(ADAPTER, "adapter_model.safetensors")):
        mine, theirs = ((spec.directory / "final" / file).read_bytes() for spec in (interrupted, straight))
        assert mine == theirs
    assert (checkpoint_of(straight.directory, STEPS) / ADAPTER / "adapter_config.json").exists()


# Reward models

HEADED = ("llama_tied", "gpt2", "qwen3_moe")


@torch.no_grad()
def rewards(model: PreTrainedModel) -> Tensor:
    scores = ScalarModel(model)(packed(GROUPS), needs=frozenset({"score"})).score
    assert scores is not None
    return scores


@pytest.fixture(scope="module")
def rankings(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """The tokenizer of ``padded`` pads with the end of an answer, so that a reward model's embedding grows by a row."""
    folder = tmp_path_factory.mktemp("rankings")
    tokenizer = byte_level(template=CHATML, eos="<|im_end|>")
    tokenizer.pad_token = "<|im_end|>"
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, folder / "padded")
    groups = [own for group in synthetic_groups([2, 3] * 6) for own in rank_group(group, by_reward=True)]
    pairs = store(folder / "pairs", groups)
    main = objective("reward_model", center=0.01)
    bases = {name: models[name] for name in HEADED} | {"padded": folder / "padded"}
    return {
        name: Scenario(model=base, streams=(pairs,), objectives=(main,), lr=1e-2, steps=STEPS, lora=LORA)
        for name, base in bases.items()
    }


@pytest.mark.parametrize("family", HEADED)
def test_a_new_adapter_changes_no_reward(family: str, models: dict[str, Path]) -> None:
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(models[family])), head=ScalarHead(), seed=3))
    model, _ = load_policy(
        ModelSpec(config=ModelConfig(name=str(models[family]), lora=LORA), head=ScalarHead(), seed=3)
    )
    assert torch.equal(rewards(model), rewards(base))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in names and all(".lora_" in name for name in names - {"score.weight"})
    assert adapted_layers(model) and "score" not in adapted_layers(model)
    with pytest.raises(UserError, match="model.lora.target_modules: score: an adapter goes onto linear layers of the"):
        load_policy(
            ModelSpec(
                config=ModelConfig(
                    name=str(models[family]), lora=LORA.model_copy(update={"target_modules": ("score",)})
                ),
                head=ScalarHead(),
            )
        )


@pytest.mark.parametrize("family", [*HEADED, "padded"])
def test_a_reward_models_adapter_and_head_are_trained_and_exported(
    family: str, rankings: dict[str, Scenario], tmp_path: Path
) -> None:
    """``final/`` for transformers, and ``adapter/`` for peft on the base, say what the trained model says."""
    scenario = rankings[family]
    final = train_alone(train_spec(tmp_path / "run", scenario), scenario)
    start, _ = load_policy(scenario.model_spec)
    model, _ = load_policy(replace(scenario.model_spec, adapter=final / ADAPTER))
    merged_model = AutoModelForSequenceClassification.from_pretrained(final)
    assert torch.allclose(rewards(merged_model), rewards(model), atol=2e-5)
    assert (rewards(model) - rewards(start)).abs().max() > 1e-2
    before, after = start.state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "score.weight" in moved and all(".lora_" in name for name in moved - {"score.weight"})

    base = AutoModelForSequenceClassification.from_pretrained(scenario.model, num_labels=1)
    loaded = PeftModel.from_pretrained(base, final / ADAPTER)
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, merged_model(input_ids=ids).logits, atol=2e-5)


@pytest.mark.parametrize("family", ["padded", "gpt2"])
def test_a_reward_models_resume_is_exact(family: str, rankings: dict[str, Scenario], tmp_path: Path) -> None:
    scenario = replace(rankings[family], lora=LORA.model_copy(update={"dropout": 0.3}))
    straight, interrupted = (train_spec(tmp_path / name, scenario) for name in ("straight", "interrupted"))
    train_alone(straight, scenario)
    with pytest.raises(Interrupted):
        train_alone(interrupted, scenario, on_step=interrupt_after(3))
    train_alone(interrupted, scenario)
    assert rows(interrupted.directory) == rows(straight.directory)
    for path in (path for path in (straight.directory / "final").rglob("*") if path.is_file()):
        mine = interrupted.directory / path.relative_to(straight.directory)
        assert path.name == "README.md" or mine.read_bytes() == path.read_bytes(), path
    assert same_optimizer(*(checkpoint_of(spec.directory, STEPS) for spec in (straight, interrupted)))


def test_a_trained_reward_model_goes_on_with_an_adapter(rankings: dict[str, Scenario], tmp_path: Path) -> None:
    """From the head that it has."""
    scenario = rankings["llama_tied"]
    first = train_alone(train_spec(tmp_path / "first", replace(scenario, lora=None)), replace(scenario, lora=None))
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(first), lora=LORA), head=ScalarHead(), seed=9))
    base, _ = load_policy(ModelSpec(config=ModelConfig(name=str(first)), head=ScalarHead()))
    assert torch.equal(rewards(model), rewards(base))
    assert torch.equal(base.score.weight, AutoModelForSequenceClassification.from_pretrained(first).score.weight)
