"""Loading, saving and digesting models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny, weights_digest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rayalign.config.model import ModelConfig
from rayalign.engine.model.folder import model_digest, model_directory, tokenizer_digest
from rayalign.engine.model.pretrained import ModelSpec, compute_dtype, load_policy, save_pretrained
from rayalign.errors import UserError

CPU = torch.device("cpu")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "yes", "no"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A saved GPT-2 with dropout everywhere."""
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    save_pretrained(model, tokenizer(), tmp_path / "model", stop_ids=(2, 4))
    return tmp_path / "model"


def test_what_is_saved_loads_with_plain_transformers(directory: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert weights_digest(loaded) == weights_digest(tiny("gpt2"))
    assert AutoTokenizer.from_pretrained(directory)("yes no")["input_ids"] == [3, 4]
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [2, 4]
    assert sorted(path.suffix for path in directory.iterdir() if "model" in path.name) == [".safetensors"]


def test_policy_is_float32_without_dropout_while_training(directory: Path) -> None:
    model, loaded_tokenizer = load_policy(ModelSpec(config=ModelConfig(name=str(directory), dtype="bfloat16")))
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert loaded_tokenizer.eos_token == "<eos>"
    ids = torch.tensor([[1, 3, 4, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny("gpt2")(ids).logits)


def test_bfloat16_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    save_pretrained(tiny("llama").bfloat16(), tokenizer(), tmp_path)
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path))))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_softcapped_attention_is_not_left_to_sdpa(tmp_path: Path) -> None:
    save_pretrained(tiny("gemma2"), tokenizer(), tmp_path)
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(tmp_path))))
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_is_switched_on(directory: Path) -> None:
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory), gradient_checkpointing=True)))
    assert model.is_gradient_checkpointing


def test_from_scratch_depends_on_the_seed_only(directory: Path) -> None:
    for weights in directory.glob("*.safetensors"):
        weights.unlink()
    before = torch.get_rng_state()
    digests = [
        weights_digest(load_policy(ModelSpec(config=ModelConfig(name=str(directory), from_scratch=True), seed=seed))[0])
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_compute_dtype(dtype: str, device: str, expected: torch.dtype) -> None:
    assert compute_dtype(ModelSpec(config=ModelConfig(name="m", dtype=dtype)), torch.device(device)) == expected  # type: ignore[arg-type]


def remove(pattern: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        for path in directory.glob(pattern):
            path.unlink()

    return edit


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("config.json"), "has no config.json: name a directory in Hugging Face layout"),
        (remove("*.safetensors"), r"holds no weights \(\*.safetensors\).*model.from_scratch: true"),
        (remove("tokenizer*"), "holds no tokenizer: save one there"),
        (pickle_weights, "pickled weights.*convert them"),
    ],
)
def test_incomplete_directories_are_named(directory: Path, edit: Callable[[Path], None], message: str) -> None:
    edit(directory)
    with pytest.raises(UserError, match=message) as error:
        load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "runs/nowhere/final"])
def test_missing_directories_are_named(name: str) -> None:
    with pytest.raises(UserError, match="model.name: there is no directory .*nowhere"):
        model_directory(name)


def test_a_hub_model_without_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="'nobody/nothing' is no directory here and could not be fetched .* name its directory"
    ):
        model_directory("nobody/nothing")


def test_digests_follow_content(directory: Path) -> None:
    model, words = model_digest(directory), tokenizer_digest(directory)
    (directory / "notes.txt").write_text("nothing that matters")
    assert (model_digest(directory), tokenizer_digest(directory)) == (model, words)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(directory) == model
    assert tokenizer_digest(directory) != words
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert model_digest(directory) != model


def test_weights_digest_sees_one_bit() -> None:
    model = tiny("llama_tied")
    before = weights_digest(model)
    assert before == weights_digest(tiny("llama_tied"))
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert weights_digest(model) != before
