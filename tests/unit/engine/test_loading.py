"""What a model's folder may lack: refused by name before a weight is read, or of no account."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_zoo import save_animal
from safetensors.torch import load_file, save_file
from tiny_models import tiny, weights_digest
from tiny_runs import save_tiny
from tiny_tokenizers import byte_level
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from rayalign.config.model import ModelConfig
from rayalign.engine.model.pretrained import ModelSpec, load_policy, model_tokenizer, refuse_unusable
from rayalign.engine.model.scalar import ScalarHead
from rayalign.errors import UserError

Edit = Callable[[Path], None]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Edit:
    def edit(directory: Path) -> None:
        file = directory / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return edit


def configuration(**changes: Any) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def renamed(rename: Callable[[str], str]) -> Edit:
    return tensors(lambda found: {rename(name): tensor for name, tensor in found.items()})


def content(make: Callable[[bytes], bytes], file: str = "model.safetensors") -> Edit:
    def edit(directory: Path) -> None:
        (directory / file).write_bytes(make((directory / file).read_bytes()))

    return edit


def sharded(directory: Path) -> None:
    """Two files and an index that names both."""
    found = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {"a.safetensors": dict(list(found.items())[:9]), "b.safetensors": dict(list(found.items())[9:])}
    for name, part in parts.items():
        save_file(part, directory / name, metadata={"format": "pt"})
    where = {tensor: name for name, part in parts.items() for tensor in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def one_shard_less(directory: Path) -> None:
    sharded(directory)
    (directory / "b.safetensors").unlink()


def an_emptier_shard(directory: Path) -> None:
    """The index names a tensor that its file does not hold."""
    sharded(directory)
    found = load_file(directory / "b.safetensors")
    found.pop(UP)
    save_file(found, directory / "b.safetensors", metadata={"format": "pt"})


def with_tensor(name: str, value: float) -> Edit:
    return tensors(
        lambda found: {**found, name: torch.full_like(found[name], value) if name in found else torch.ones(3)}
    )


def renamed_file(name: str) -> Edit:
    return lambda directory: (directory / "model.safetensors").rename(directory / name) and None


def own_code(directory: Path) -> None:
    configuration(model_type="tinyx", auto_map={"AutoConfig": "tinyx.Config", "AutoModelForCausalLM": "tinyx.Model"})(
        directory
    )


REFUSED: dict[str, tuple[Edit, str]] = {
    "a tensor is missing": (
        tensors(lambda found: {name: tensor for name, tensor in found.items() if name != UP}),
        rf"lacks 1 of the 21 tensors of a LlamaForCausalLM, which would be random: {UP}\. Copy",
    ),
    "many are missing": (
        tensors(lambda found: {name: tensor for name, tensor in found.items() if ".1." not in name}),
        r"lacks 9 of the 21 tensors .* model.layers.1.input_layernorm.weight, .*, .*, …",
    ),
    "saved from DDP": (
        renamed("module.{}".format),
        r"21 of the 21 .* 'module\.' precedes them, as in module\.lm_head",
    ),
    "saved from torch.compile": (renamed("_orig_mod.{}".format), r"'_orig_mod\.' precedes them"),
    "saved as a part of something": (renamed("actor.{}".format), r"'actor\.' precedes them, as in actor\.lm_head"),
    "saved while ZeRO-3 held it": (
        tensors(lambda found: {**found, UP: torch.empty(0)}),
        rf"holds 1 tensor without content: {UP}\. .*ZeRO-3",
    ),
    "whole numbers": (
        tensors(lambda found: {**found, UP: found[UP].to(torch.int8)}),
        rf"holds whole numbers for 1 tensor: {UP}\. Such weights are quantised",
    ),
    "other names": (
        renamed(lambda name: name.replace("self_attn", "attention")),
        r"lacks 8 of the 21 .*self_attn.*; it has model.layers.0.attention.*instead",
    ),
    "no head": (
        tensors(lambda found: {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}),
        r"has no lm_head.weight, .*tie_word_embeddings: false, .*write true there",
    ),
    "a value head": (
        with_tensor("v_head.summary.weight", 1.0),
        r"holds 1 tensor that a LlamaForCausalLM has no place for: v_head",
    ),
    "biases that the configuration has not": (
        with_tensor("model.layers.0.self_attn.q_proj.bias", 1.0), r"no place for: model.layers.0.self_attn.q_proj.bias"
    ),
    "an adapter that was not merged": (
        renamed(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")),
        r"lacks 2 .*q_proj\.base_layer.*instead",
    ),
    "another width": (
        configuration(intermediate_size=64),
        r"down_proj.weight is 32×48 in the files, and 32×64 by config.json \(6 tensors",
    ),
    "another vocabulary": (configuration(vocab_size=400), r"lm_head.weight is 330×32 in the files, and 400×32"),
    "more layers": (configuration(num_hidden_layers=3), r"lacks 9 of the 30 tensors"),
    "fewer layers": (configuration(num_hidden_layers=1), r"holds 9 tensors that a LlamaForCausalLM has no place for"),
    "a file that is cut short": (
        content(lambda data: data[: len(data) // 2]),
        r"model.safetensors is cut short or damaged",
    ),
    "an empty file": (content(lambda data: b""), r"model.safetensors is cut short or damaged"),
    "a pointer of Git LFS": (
        content(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 146136\n"),
        r"model.safetensors is a pointer of Git LFS, not the file itself: run git lfs pull",
    ),
    "a shard is missing": (one_shard_less, r"lacks 1 of its 2 files of weights: b.safetensors"),
    "a shard holds less than the index says": (an_emptier_shard, rf"lacks 1 of the 21 tensors .*{UP}"),
    "weights under another name": (
        renamed_file("consolidated.safetensors"),
        r"holds consolidated.safetensors, but neither",
    ),
    "pickled weights": (renamed_file("pytorch_model.bin"), r"holds pickled weights, which run code when loaded"),
    "GGUF beside a configuration": (renamed_file("model-q4.gguf"), r"holds GGUF files\. GGUF is llama.cpp's format"),
    "a configuration that is no JSON": (
        content(lambda data: data[:40], "config.json"),
        r"config.json is not valid JSON",
    ),
    "a configuration that is a list": (content(lambda data: b"[]", "config.json"), r"config.json is no JSON object"),
    "a configuration in Git LFS": (
        content(lambda data: b"version https://git-lfs.github.com/spec/v1\n", "config.json"),
        r"config.json is a pointer of Git LFS",
    ),
    "an activation that does not exist": (
        configuration(hidden_act="swoosh"), r"transformers cannot make a model of .*config.json \(KeyError: 'swoosh'\)"
    ),
    "an unknown type": (
        configuration(model_type="llamb"),
        r"of type 'llamb', which transformers .* does not know",
    ),
    "a configuration that transformers refuses": (
        configuration(num_attention_heads=5), r"config.json is refused by transformers: .*attention heads"
    ),
    "code of its own": (
        own_code,
        r"code of its own \(tinyx.py\), which runs only if you say so: .*model.trust_remote_code: true",
    ),
    "classes that are no names": (configuration(architectures=[None]), r"has architectures that are no list of names"),
    "a part that the type has not": (
        configuration(text_config={"vocab_size": 4}),
        r"has a text_config, which llama models have not",
    ),
    "an index without names": (
        lambda directory: sharded(directory) or content(
            lambda data: b'{"weight_map": {"lm_head.weight": null}}', "model.safetensors.index.json"
        )(directory),
        r"index.json has no weight_map that names files",
    ),
    "quantised somehow": (configuration(quantization_config="awq"), r"are quantised \(awq, see quantization"),
    "AWQ": (
        configuration(quantization_config={"quant_method": "awq", "bits": 4}),
        r"are quantised \(awq, see quantization",
    ),
    "GPTQ": (configuration(quantization_config={"quant_method": "gptq", "bits": 4}), r"are quantised \(gptq"),
    "bitsandbytes": (configuration(quantization_config={"load_in_4bit": True}), r"are quantised \(bitsandbytes"),
    "FP8": (configuration(quantization_config={"quant_method": "fp8"}), r"are quantised \(fp8"),
    "MXFP4": (configuration(quantization_config={"quant_method": "mxfp4"}), r"are quantised \(mxfp4"),
    "eight-bit floats": (
        tensors(lambda found: {**found, UP: found[UP].to(torch.float8_e4m3fn)}),
        r"tensors of type F8_E4M3, which are quantised",
    ),
    "a classifier": (
        configuration(architectures=["LlamaForSequenceClassification"]),
        r"for sequence classification.*no LM head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_folder_lacks_is_said_before_a_weight_is_read(case: str, llama: Path, tmp_path: Path) -> None:
    edit, message = REFUSED[case]
    directory = shutil.copytree(llama, tmp_path / "model")
    edit(directory)
    spec = ModelSpec(config=ModelConfig(name=str(directory)), field="model.reference")
    for attempt in (refuse_unusable, load_policy):
        with pytest.raises(UserError, match=message) as error:
            attempt(spec)
        assert str(error.value).startswith("model.reference: ") and str(directory) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_head_that_is_no_copy_of_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    """Transformers would untie them with a warning, and serving engines read one of the two."""
    directory = save_tiny(tmp_path / "model", "llama_tied")
    tensors(lambda found: {**found, "lm_head.weight": 1 + found["model.embed_tokens.weight"]})(directory)
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))
    with pytest.raises(UserError, match=r"lm_head.weight and model.embed_tokens.weight, which differ .*: false there"):
        load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    configuration(tie_word_embeddings=False)(directory)
    model, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
    assert torch.equal(model.lm_head.weight, 1 + model.model.embed_tokens.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")

    def spoil(found: dict[str, Tensor]) -> dict[str, Tensor]:
        found[UP][1, 2] = value
        return found

    tensors(spoil)(directory)
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))
    with pytest.raises(UserError, match=rf"no finite numbers, in 1 of its tensors: {UP}"):
        load_policy(ModelSpec(config=ModelConfig(name=str(directory))))


def test_a_tokenizer_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    content(lambda data: b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.json")(directory)
    with pytest.raises(UserError, match=r"tokenizer.json is a pointer of Git LFS"):
        model_tokenizer(ModelSpec(config=ModelConfig(name=str(directory))))
    shutil.copy(llama / "tokenizer.json", directory)
    content(lambda data: b"version https://git-lfs.github.com/spec/v1\n", "chat_template.jinja")(directory)
    with pytest.raises(UserError, match=r"chat_template.jinja is a pointer of Git LFS"):
        model_tokenizer(ModelSpec(config=ModelConfig(name=str(directory))))
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert any(directory.glob("chat_template*"))
    with pytest.raises(UserError, match=r"holds no tokenizer: save one there"):
        model_tokenizer(ModelSpec(config=ModelConfig(name=str(directory))))


def test_a_tokenizer_that_writes_control_tokens_as_words(llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    assert len(AutoTokenizer.from_pretrained(directory)("<|im_end|>")["input_ids"]) > 1
    with pytest.raises(UserError, match=r"says split_special_tokens: true, .*: remove that from tokenizer_config.json"):
        model_tokenizer(ModelSpec(config=ModelConfig(name=str(directory))))


HARMLESS: dict[str, Edit] = {
    "frequencies of RoPE": with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", 1.0),
    "causal masks": tensors(
        lambda found: {
            **found,
            "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        }
    ),
    "two files": sharded,
    "no quantisation": configuration(quantization_config={}),
    "further outputs": configuration(output_attentions=True, output_hidden_states=True, return_dict=False),
    "whole numbers of no account": tensors(
        lambda found: {**found, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4)}
    ),
    "bfloat16": tensors(lambda found: {name: tensor.bfloat16().float() for name, tensor in found.items()}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_transformers_declares_of_no_account_loads(case: str, llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    HARMLESS[case](directory)
    expected = tiny("llama", vocab_size=330)
    if case == "bfloat16":
        expected = expected.bfloat16().float()
    assert weights_digest(load_policy(ModelSpec(config=ModelConfig(name=str(directory))))[0]) == weights_digest(
        expected
    )


def test_tied_heads_and_heads_for_several_tokens_need_no_tensor(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "tied", "llama_tied")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(tied))))
    more = save_animal(tmp_path / "more", "deepseek_v3")
    with_tensor("model.layers.61.eh_proj.weight", 1.0)(more)  # DeepSeek-V3's own second head
    refuse_unusable(ModelSpec(config=ModelConfig(name=str(more))))
    load_policy(ModelSpec(config=ModelConfig(name=str(more))))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_one_expert_less_is_noticed(family: str, tmp_path: Path) -> None:
    """Files hold one tensor per expert, which are fused on their way into the model."""
    directory = save_animal(tmp_path / family, family)
    names = [name for name in load_file(directory / "model.safetensors") if ".experts.2." in name]
    tensors(lambda found: {name: tensor for name, tensor in found.items() if name != names[0]})(directory)
    with pytest.raises(
        UserError, match=rf"experts\.(gate_up_proj|down_proj)|lacks 1 tensor of its experts: {names[0]}"
    ):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def test_models_that_do_not_continue_texts_are_refused(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=330, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    directory = saved(T5ForConditionalGeneration(t5), tmp_path / "t5")
    with pytest.raises(UserError, match=r"an encoder and a decoder \(t5\); name one that only decodes"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))
    bert = BertConfig(vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    directory = saved(BertForMaskedLM(bert), tmp_path / "bert")
    with pytest.raises(UserError, match=r"\(BertForMaskedLM\) reads a text in both directions"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))


def test_files_and_folders_of_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a file: GGUF is llama.cpp's format of quantised weights"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path / "model-q4.gguf"))))
    with pytest.raises(UserError, match=r"has no config.json: it holds GGUF files"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path))))
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no config.json: it holds weights as their authors trained them"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(meta))))
    for inside in ("checkpoint-100/config.json", "snapshots/0123/config.json", "dpo/adapter_config.json"):
        path = tmp_path / inside.replace("/", "-") / inside
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        with pytest.raises(UserError, match=f"has no config.json: name the model inside it, such as {path.parent}"):
            refuse_unusable(ModelSpec(config=ModelConfig(name=str(tmp_path / inside.replace("/", "-")))))


# Scalar heads


def scalar(directory: Path, *, labels: int = 1) -> Path:
    config = LlamaConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_labels=labels,
    )  # fmt: skip
    return saved(AutoModelForSequenceClassification.from_config(config), directory)


def test_a_trained_head_must_be_in_the_files(llama: Path, tmp_path: Path) -> None:
    spec = ModelSpec(config=ModelConfig(name=str(scalar(tmp_path / "rm"))), head=ScalarHead(), trained_head=True)
    head = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
    assert torch.equal(load_policy(spec)[0].score.weight, head)
    with_tensor("score.bias", 1.0)(tmp_path / "rm")
    with pytest.raises(UserError, match=r"has no place for: score.bias"):
        load_policy(spec)
    tensors(lambda found: {name: tensor for name, tensor in found.items() if name != "score.bias"})(tmp_path / "rm")
    renamed(lambda name: name.replace("score.", "value_head."))(tmp_path / "rm")
    message = r"has no trained scalar head: score.weight is not in its files, which have value_head.weight instead"
    with pytest.raises(UserError, match=message):
        refuse_unusable(spec)
    with pytest.raises(UserError, match=message):  # the folder says that it is a classifier
        load_policy(ModelSpec(config=ModelConfig(name=spec.name), head=ScalarHead()))
    with pytest.raises(UserError, match=r"has no trained scalar head: score.weight is not in its files"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(llama)), head=ScalarHead(), trained_head=True))
    load_policy(
        ModelSpec(config=ModelConfig(name=str(llama)), head=ScalarHead())
    )  # asked for: a new head on a language model


def test_heads_of_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 outputs; a reward model has one"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(scalar(tmp_path / "two", labels=2))), head=ScalarHead()))
    config = LlamaConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )  # fmt: skip
    directory = saved(AutoModelForTokenClassification.from_config(config), tmp_path / "prm")
    with pytest.raises(UserError, match="is a LlamaForTokenClassification; a reward model is one for sequence"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory)), head=ScalarHead(), trained_head=True))


def test_a_backbone_lacks_nothing_under_a_new_head(llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    tensors(lambda found: {name: tensor for name, tensor in found.items() if name != UP})(directory)
    with pytest.raises(UserError, match=rf"lacks 1 of the 21 tensors of a LlamaForSequenceClassification.*{UP}"):
        load_policy(ModelSpec(config=ModelConfig(name=str(directory)), head=ScalarHead()))
