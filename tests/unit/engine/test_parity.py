"""The proof of a model family's layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_zoo import animal, save_animal
from tiny_models import tiny
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from rayalign.config.model import ModelConfig
from rayalign.engine.model import parity
from rayalign.engine.model.attention import CONCATENATED_ONLY, AttentionKind, Reach, attention_kinds
from rayalign.engine.model.group_attention import GROUP_ATTENTION, attend
from rayalign.engine.model.parity import choose_attention, measure_attention
from rayalign.engine.model.pretrained import CPU, ModelSpec, load_policy, model_tokenizer, refuse_unusable
from rayalign.engine.model.shrunken import WINDOW, probe_for
from rayalign.engine.model.trial import try_export
from rayalign.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    return tmp_path / "parity"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_windowed", "gemma2", "gemma3", "qwen3_windowed", "llama4"])
def test_most_families_are_packed(name: str) -> None:
    model = tiny(name)
    model.set_attn_implementation("eager")
    first, *_ = measure_attention(model).items()
    assert first[1] < 1e-5
    assert choose_attention(model) == attention_kinds(model.config, CPU)[first[0]]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "olmoe", "glm4", "cohere2", "exaone4", "phimoe", "opt"])
def test_families_that_no_table_names_are_packed(name: str) -> None:
    """Attention through a latent vector, sinks, experts, windows in some layers, learned positions."""
    assert choose_attention(animal(name)).implementation == GROUP_ATTENTION


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_masks_that_a_model_adds_to_its_own_scores_are_dense(name: str) -> None:
    """Their attention is among the best of the tokens that are seen: the probe is longer than that."""
    model = animal(name)
    probe = probe_for(model, CPU)
    assert probe.config.index_topk == WINDOW
    assert choose_attention(model) == AttentionKind(reach=Reach(), implementation="eager")


def test_queries_that_are_scaled_by_position_are_proven_where_the_scale_changes() -> None:
    model = animal("llama4_text", attn_temperature_tuning=True, floor_scale=8192)
    assert probe_for(model, CPU).config.floor_scale == WINDOW
    found = measure_attention(model)
    assert choose_attention(model).layout == ("packed" if min(found.values()) < 1e-3 else "concatenated")
    assert found["plain sequences"] < 1e-5


def test_a_long_window_is_proven_with_a_short_one() -> None:
    model = tiny("mistral_windowed", sliding_window=4096, num_hidden_layers=5, vocab_size=500)
    probe = probe_for(model, CPU)
    assert (probe.config.sliding_window, probe.config.num_hidden_layers, probe.config.vocab_size) == (8, 2, 48)
    assert model.config.sliding_window == 4096
    assert choose_attention(model).reach == Reach(window=4096)


def test_every_layer_type_is_proven() -> None:
    model = tiny("gemma3", num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    assert probe_for(model, CPU).config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_other_families_are_concatenated_and_told_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = measure_attention(tiny(name))
    assert min(error for kind, error in found.items() if kind != "plain sequences") > 0.1
    with caplog.at_level(logging.WARNING):
        assert choose_attention(tiny(name)) == CONCATENATED_ONLY
    assert f"{name} models are trained on one sequence per row" in caplog.text


def test_a_mask_without_the_window_is_not_taken() -> None:
    model = tiny("mistral_windowed", sliding_window=4096)
    probe = probe_for(model, CPU)
    groups = parity.groups_for(probe)
    expected = parity.plain_outcome(probe, groups)
    wrong = AttentionKind(reach=Reach(), implementation=GROUP_ATTENTION)
    assert parity.difference_of(probe, groups, wrong, expected) > 0.5


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(*arguments: Any, **more: Any) -> tuple[Tensor, None]:
        output, nothing = attend(*arguments, **more)
        return output.detach(), nothing

    AttentionInterface.register("detached", detached)
    AttentionMaskInterface.register("detached", sdpa_mask)
    monkeypatch.setattr("rayalign.engine.model.attention.GROUP_ATTENTION", "detached")
    assert choose_attention(tiny("llama")).implementation == "eager"


def test_a_family_that_changes_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayalign.engine.model.parity.probe_for", lambda model, device: model)
    model = tiny("bloom")
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UserError, match=r"log-probs of bloom models differ by \d.* nats"):
        choose_attention(model)


def test_a_configuration_that_computes_nothing_is_a_sentence(tmp_path: Path) -> None:
    """More experts per token than there are: it can be made and loaded, and transformers fails with its first text."""
    spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / "model", "mixtral", num_experts_per_tok=9))))
    message = r"a mixtral model of this configuration computes nothing \(RuntimeError: .*\): a value in its config.json"
    with pytest.raises(UserError, match=message):
        try_export(refuse_unusable(spec), model_tokenizer(spec), spec)
    with pytest.raises(UserError, match=message):
        choose_attention(load_policy(spec)[0])


def test_the_proof_is_kept_per_configuration(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def counted(model: PreTrainedModel, **place: torch.device | None) -> dict[str, float]:
        measured.append(model.config.model_type)
        return measure_attention(model, **place)

    monkeypatch.setattr(parity, "measure_attention", counted)
    for name in ("llama", "llama", "olmo2", "llama"):
        choose_attention(tiny(name))
    assert measured == ["llama", "olmo2"]
    assert all(max(json.loads(path.read_text()).values()) < 1e-5 for path in cache.iterdir())
