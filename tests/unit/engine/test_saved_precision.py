"""In which precision a model is saved, and that what is measured of a run is what it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from causal_zoo import save_animal
from safetensors.torch import load_file, save_file
from tiny_models import tiny, weights_digest
from tiny_runs import Scenario, objective, save_tiny, store, synthetic_groups, train_alone, train_spec
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForCausalLM

from rayalign.config.model import ModelConfig
from rayalign.engine.model.precision import EXACT, Precision, precision_of
from rayalign.engine.model.pretrained import ModelSpec, kept_precision, load_policy, save_pretrained

NORM = "model.norm.weight"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A tied model in bfloat16, but for one float32 tensor."""
    directory = save_tiny(tmp_path / "mixed", "llama_tied")
    file = directory / "model.safetensors"
    found = {name: tensor if name == NORM else tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(found, file, metadata={"format": "pt"})
    return directory


def test_by_itself_that_of_the_files(mixed: Path, tmp_path: Path) -> None:
    assert precision_of(mixed, "auto") == Precision(default="bfloat16", exact=frozenset({NORM}))
    assert precision_of(mixed, "float32") == EXACT
    assert precision_of(mixed, "float16") == Precision(default="float16")
    assert precision_of(save_tiny(tmp_path / "exact"), "auto") == EXACT


def test_tensors_that_have_other_names_in_memory(tmp_path: Path) -> None:
    """A router in float32, which Mixtral's files call block_sparse_moe.gate and its class mlp.gate."""
    directory = save_animal(tmp_path / "model", "mixtral")
    file = directory / "model.safetensors"
    found = {name: own if ".gate." in name else own.bfloat16() for name, own in load_file(file).items()}
    save_file(found, file, metadata={"format": "pt"})
    spec = ModelSpec(config=ModelConfig(name=str(directory)))
    precision = kept_precision(spec, "auto")
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"} < precision.exact
    save_pretrained(*load_policy(spec), tmp_path / "final", precision=precision)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(saved[name].dtype == own.dtype and torch.equal(saved[name], own) for name, own in found.items())


def test_final_is_saved_so_and_checkpoints_are_float32(mixed: Path, tmp_path: Path) -> None:
    pairs = store(tmp_path / "pairs", synthetic_groups([2] * 6), reference=mixed)
    scenario = Scenario(model=mixed, streams=(pairs,), objectives=(objective("dpo"),), lr=1e-2, steps=2)
    spec = train_spec(tmp_path / "run", scenario, saved=precision_of(mixed, "auto"))
    final = train_alone(spec, scenario)
    saved = load_file(final / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        name: tensor.dtype for name, tensor in load_file(mixed / "model.safetensors").items()
    }
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.bfloat16
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step_000002-*")
    exact = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(saved[name], tensor.to(saved[name].dtype)) for name, tensor in exact.items())
    # A checkpoint that is measured has the weights of the saved model.
    rounded, _ = load_policy(ModelSpec(config=ModelConfig(name=str(checkpoint)), rounded=spec.saved))
    assert weights_digest(rounded) == weights_digest(load_policy(ModelSpec(config=ModelConfig(name=str(final))))[0])
    assert weights_digest(rounded) != weights_digest(
        load_policy(ModelSpec(config=ModelConfig(name=str(checkpoint))))[0]
    )


def test_what_is_tied_stays_one_tensor(tmp_path: Path) -> None:
    tokenizer = byte_level(template=CHATML)
    model = tiny("llama_tied", vocab_size=len(tokenizer))
    cast = Precision(default="bfloat16").cast(model.state_dict())
    assert cast["lm_head.weight"].data_ptr() == cast["model.embed_tokens.weight"].data_ptr()
    save_pretrained(model, tokenizer, tmp_path, precision=Precision(default="bfloat16"))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
