"""What of a model gets an adapter, and that what is saved of it is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from causal_zoo import animal, save_animal
from tiny_models import tiny
from tiny_runs import save_tiny

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.engine.model import trial
from rayalign.engine.model.lora import adapted_layers, state_with_adapter_merged
from rayalign.engine.model.pretrained import ModelSpec, load_policy, model_tokenizer, refuse_unusable
from rayalign.engine.model.shrunken import miniature
from rayalign.engine.model.targets import adapter_targets, ends, fused_experts, shorten_names
from rayalign.engine.model.trial import ExportTrial, try_export
from rayalign.errors import UserError

LORA = LoraConfig(rank=2, alpha=4.0)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


ATTENTION = "k_proj, o_proj, q_proj, v_proj"
DEFAULT: dict[str, tuple[str, str]] = {
    "llama": ("down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj", ""),
    "gpt2": ("c_attn, c_fc, c_proj", ""),
    "mixtral": (ATTENTION, "down_proj, gate_up_proj"),
    "qwen3_moe": (ATTENTION, "down_proj, gate_up_proj"),
    "llama4_text": (f"down_proj, gate_proj, {ATTENTION}, up_proj", "down_proj, gate_up_proj, router"),
    "granitemoe": (ATTENTION, "down_proj, gate_up_proj"),
    "jamba": (
        f"down_proj, gate_proj, in_proj, {ATTENTION}, out_proj, router, up_proj, x_proj",
        "down_proj, dt_proj, gate_up_proj",
    ),
    "nemotron_h": (f"down_proj, in_proj, {ATTENTION}, up_proj", "down_proj, out_proj, up_proj"),
    "longcat_flash": ("", "classifier, down_proj, gate_up_proj"),
}  # fmt: skip
"""Family → (layers with an adapter, what has none), by the last parts of their names; no layers: not compared."""


@pytest.mark.parametrize("family", DEFAULT)
def test_by_itself_every_linear_layer_that_the_model_calls(family: str) -> None:
    with META:
        model = animal(family)
    layers, left_out = DEFAULT[family]
    found = adapter_targets(model)
    assert found.experts == () and ends((*found.plain_experts, *found.plain_layers)) == left_out
    assert not layers or sorted(ends(found.layers).split(", ")) == sorted(set(layers.split(", ")))
    assert not any("lm_head" in name for name in found.layers)


def test_what_is_named_is_adapted_experts_too() -> None:
    with META:
        model = animal("deepseek_v3")
    found = adapter_targets(model, ["experts.gate_up_proj", "down_proj"])
    assert found.experts == ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    assert found.layers == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj")
    assert (found.plain_experts, found.plain_layers) == ((), ())
    assert "2 linear layers (down_proj) and 2 tensors of fused experts (down_proj, gate_up_proj)" in found.sentence()
    with pytest.raises(
        UserError, match=r"target_modules: gate_porj: .*, and experts' tensors, which are down_proj, gate_up"
    ):
        adapter_targets(model, ["gate_porj"])


def test_dropout_has_no_place_on_experts(tmp_path: Path) -> None:
    directory = save_animal(tmp_path / "model", "qwen3_moe")
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.1, target_modules=("q_proj", "gate_up_proj"))
    with pytest.raises(UserError, match=r"model.lora.dropout: 0.1: .* fused experts \(.*gate_up_proj\) have none"):
        load_policy(ModelSpec(config=ModelConfig(name=str(directory), lora=lora)))


def test_the_merge_of_an_expert_by_hand(tmp_path: Path) -> None:
    """W_e + (α / r) B_e A_e, where A holds the rows of expert e together and B its columns in turn."""
    directory = save_animal(tmp_path / "model", "qwen3_moe")
    lora = LoraConfig(rank=2, alpha=6.0, target_modules=("experts.down_proj",))
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory), lora=lora)))
    layer = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    layer.lora_B["default"].weight.data.normal_()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer.down_proj
    found = state_with_adapter_merged(model, model.state_dict())["model.layers.0.mlp.experts.down_proj"]
    for expert in range(4):
        own = base[expert] + 3.0 * B[:, expert::4] @ A[2 * expert : 2 * expert + 2]
        assert torch.allclose(found[expert], own, atol=1e-6)
    assert len(adapted_layers(model)) == 2


def test_short_names_only_where_they_fit_nothing_else() -> None:
    assert shorten_names(["a.0.q", "a.1.q", "a.0.k"], among=["a.0.q", "a.1.q", "a.0.k", "a.1.v"]) == ["k", "q"]
    assert shorten_names(["a.0.q"], among=["a.0.q", "vision.q"]) == ["a.0.q"]
    assert shorten_names(["a.0.up.weight", "a.1.up.weight"], among=["a.0.up.weight", "a.1.up.weight"]) == ["up.weight"]


# The trial


@pytest.mark.parametrize(("family", "lora"), [("llama_tied", None), ("gpt2", LORA), ("gemma2", LORA)])
def test_what_will_be_saved_is_saved_before_the_first_step(
    family: str, lora: LoraConfig | None, tmp_path: Path
) -> None:
    spec = ModelSpec(config=ModelConfig(name=str(save_tiny(tmp_path / "model", family)), lora=lora))
    found = try_export(refuse_unusable(spec), model_tokenizer(spec), spec)
    assert found.difference is not None and found.difference < 1e-4 and not found.problem
    assert found.writes_adapter is (lora is not None)


def test_a_trial_is_kept_by_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[ModelSpec] = []

    def counted(model: object, spec: ModelSpec) -> ExportTrial:
        measured.append(spec)
        return ExportTrial(difference=0.0)

    monkeypatch.setattr(trial, "measure_export", counted)
    for name in ("one", "two"):
        for lora in (None, LORA):
            spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / name, "llama")), lora=lora))
            try_export(refuse_unusable(spec), model_tokenizer(spec), spec)
    assert [spec.config.lora for spec in measured] == [None, LORA]


def test_an_export_that_loses_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of adapters on fused experts did, whose tensors kept peft's names."""
    spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / "model", "llama")), lora=LORA))
    skeleton, tokenizer = refuse_unusable(spec), model_tokenizer(spec)
    monkeypatch.setattr(
        trial,
        "state_with_adapter_merged",
        lambda model, state: {n: t for n, t in state_with_adapter_merged(model, state).items() if "up_" not in n},
    )
    with pytest.raises(
        UserError, match=r"an adapter on a llama model is another one once .* cannot be loaded: .*lacks 2 of"
    ):
        try_export(skeleton, tokenizer, spec)
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(
        trial,
        "state_with_adapter_merged",
        lambda model, state: {n: 1.1 * t for n, t in state_with_adapter_merged(model, state).items()},
    )
    with pytest.raises(UserError, match=r"logits differ by .*; name other model.lora.target_modules, or train without"):
        try_export(skeleton, tokenizer, spec)


def test_an_adapter_that_peft_reads_otherwise_is_not_written(tmp_path: Path) -> None:
    """Peft 0.21 renames laguna's shared experts twice on the way in."""
    spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / "model", "laguna")), lora=LORA))
    found = try_export(refuse_unusable(spec), model_tokenizer(spec), spec)
    assert found.difference is not None and found.difference < 1e-4 and not found.writes_adapter


def test_a_tokenizer_that_does_not_survive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / "model", "llama"))))
    tokenizer = model_tokenizer(spec)
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"a": id(self)})
    with pytest.raises(UserError, match=r"the tokenizer is another one once it is saved .* \(get_vocab differ"):
        try_export(refuse_unusable(spec), tokenizer, spec)


def test_of_a_large_model_a_small_one_is_tried() -> None:
    with META:
        model = tiny("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, vocab_size=128_000)  # fmt: skip
    small = miniature(model)
    assert small is not None and sum(parameter.numel() for parameter in small.parameters()) < 10**7
    assert (small.config.num_hidden_layers, small.config.num_key_value_heads) == (2, 2)
    with META:
        experts = animal("deepseek_v3", hidden_size=7168, num_attention_heads=128, num_key_value_heads=128,
                         n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8, num_hidden_layers=61,
                         first_k_dense_replace=3, moe_intermediate_size=2048, intermediate_size=18432)  # fmt: skip
    small = miniature(experts)
    assert small is not None and len(fused_experts(small)) == 2
