"""The proof of a model family's layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from causal_zoo import save_animal
from tiny_models import tiny
from transformers import PreTrainedModel

from rayalign.config.model import ModelConfig
from rayalign.engine.model import parity
from rayalign.engine.model.attention import AttentionKind, Reach
from rayalign.engine.model.parity import choose_layout, measure_layouts
from rayalign.engine.model.pretrained import ModelSpec, load_policy, model_tokenizer, refuse_unusable
from rayalign.engine.model.trial import try_export
from rayalign.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path))
    return tmp_path / "parity"


def pretend_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family claims to have no window."""
    for module in ("parity", "forward"):
        monkeypatch.setattr(
            f"rayalign.engine.model.{module}.attention_kind", lambda config: AttentionKind(reach=Reach())
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_windowed", "gemma3", "qwen3_windowed"])
def test_known_families_are_packed(name: str) -> None:
    model = tiny(name)
    assert max(measure_layouts(model).values()) < 1e-5
    assert choose_layout(model) == "packed"


def test_a_long_window_is_proven_with_a_short_one() -> None:
    model = tiny("mistral_windowed", sliding_window=4096, num_hidden_layers=5, vocab_size=500)
    probe = parity.shrunken(model)
    assert (probe.config.sliding_window, probe.config.num_hidden_layers, probe.config.vocab_size) == (8, 2, 48)
    assert model.config.sliding_window == 4096
    assert choose_layout(model) == "packed"


def test_every_layer_type_is_proven() -> None:
    model = tiny("gemma3", num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
    assert parity.shrunken(model).config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_other_families_are_concatenated(name: str) -> None:
    assert set(measure_layouts(tiny(name))) == {"concatenated"}
    assert choose_layout(tiny(name)) == "concatenated"


def test_a_wrong_mask_selects_concatenated_and_says_by_how_much(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_plain(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert choose_layout(tiny("mistral_windowed", sliding_window=4096)) == "concatenated"
    (record,) = caplog.records
    assert "mistral models read packed rows wrongly" in record.getMessage()
    assert record.args is not None and record.args[2] > 0.5  # type: ignore[index]


def test_a_family_that_changes_its_logits_is_refused() -> None:
    model = tiny("bloom")
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UserError, match=r"log-probs of bloom models differ by \d.* nats"):
        choose_layout(model)


def test_a_configuration_that_computes_nothing_is_a_sentence(tmp_path: Path) -> None:
    """More experts per token than there are: it can be made and loaded, and transformers fails with its first text."""
    spec = ModelSpec(config=ModelConfig(name=str(save_animal(tmp_path / "model", "mixtral", num_experts_per_tok=9))))
    message = r"a mixtral model of this configuration computes nothing \(RuntimeError: .*\): a value in its config.json"
    with pytest.raises(UserError, match=message):
        try_export(refuse_unusable(spec), model_tokenizer(spec), spec)
    with pytest.raises(UserError, match=message):
        choose_layout(load_policy(spec)[0])


def test_the_proof_is_kept_per_configuration(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def counted(model: PreTrainedModel, **place: torch.device | None) -> dict[str, float]:
        measured.append(model.config.model_type)
        return measure_layouts(model, **place)

    monkeypatch.setattr(parity, "measure_layouts", counted)
    for name in ("llama", "llama", "olmo2", "llama"):
        choose_layout(tiny(name))
    assert measured == ["llama", "olmo2"]
    assert all(json.loads(path.read_text())["packed"] < 1e-5 for path in cache.iterdir())
