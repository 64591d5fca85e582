"""Models of texts and images: trained whole where they load whole, else the part for texts, if that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Scenario, objective, store, synthetic_groups, train_alone, train_spec
from tiny_tokenizers import CHATML, byte_level
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.engine.model.pretrained import ModelSpec, load_policy, refuse_unusable
from rayalign.errors import UserError

IDS = torch.arange(5, 40)[None]
TEXT: dict[str, Any] = dict(
    vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, eos_token_id=1,
    tie_word_embeddings=False,
)  # fmt: skip
DELTA: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
EYES: dict[str, Any] = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
TOKENS: dict[str, Any] = dict(image_token_id=310, video_token_id=311, vision_start_token_id=312)


def gemma3() -> PreTrainedModel:
    eyes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = dict(mm_tokens_per_image=4, image_token_index=310, boi_token_index=311, eoi_token_index=312)
    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eyes, **tokens))


def qwen3_5() -> PreTrainedModel:
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config={**TEXT, **DELTA}, vision_config=EYES, tie_word_embeddings=False, **TOKENS)
    )


def qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=EYES, **TOKENS))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Callable[[], PreTrainedModel]], tuple[Path, PreTrainedModel]]:
    def save(make: Callable[[], PreTrainedModel]) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(0)
        model = make().eval()
        model.save_pretrained(tmp_path / "model")
        byte_level(template=CHATML).save_pretrained(tmp_path / "model")
        return tmp_path / "model", model

    return save


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("make", [qwen3_5, qwen2_5_vl])
def test_a_part_is_not_taken_without_a_word(make: Callable[[], PreTrainedModel], saved) -> None:
    directory, _ = saved(make)
    remedy = (
        r"write model\.text_only: true" if make is qwen3_5 else r"no language model for that part \(qwen2_5_vl_text"
    )
    with pytest.raises(UserError, match=rf"model of text and vision, of which only the text part .*: .*{remedy}"):
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory))))
    with pytest.raises(UserError, match=r"name a model of text alone"):  # where no such setting exists
        refuse_unusable(ModelSpec(config=ModelConfig(name=str(directory)), field="sample"))


@pytest.mark.parametrize(("make", "kind"), [(qwen3_5, "qwen3_5_text"), (gemma3, "gemma3_text")])
def test_the_part_for_texts_computes_what_the_whole_does(make: Callable[[], PreTrainedModel], kind: str, saved) -> None:
    directory, whole = saved(make)
    spec = ModelSpec(config=ModelConfig(name=str(directory), text_only=True))
    assert refuse_unusable(spec).config.model_type == kind
    model, _ = load_policy(spec)
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)
    assert not any("vision" in name or "visual" in name for name in model.state_dict())


def trained(directory: Path, folder: Path, **changes: Any) -> Path:
    pairs = store(folder / "pairs", synthetic_groups([2] * 6))
    scenario = Scenario(model=directory, streams=(pairs,), objectives=(objective("simpo"),), steps=2, lr=1e-2)
    spec = train_spec(folder / "run", scenario)
    model = replace(spec.model, config=spec.model.config.model_copy(update=changes))
    return train_alone(replace(spec, model=model), scenario)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4.0)], ids=["all weights", "LoRA"])
def test_what_texts_do_not_pass_through_stays_as_it_was(lora: LoraConfig | None, saved, tmp_path: Path) -> None:
    directory, _ = saved(gemma3)
    final = trained(directory, tmp_path, lora=lora)
    before, after = load_file(directory / "model.safetensors"), load_file(final / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or name == "lm_head.weight" for name in changed)
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    assert type(reloaded) is Gemma3ForConditionalGeneration


def test_a_run_of_the_part_for_texts_saves_that_part(saved, tmp_path: Path) -> None:
    directory, whole = saved(qwen3_5)
    final = trained(directory, tmp_path, text_only=True)
    reloaded, found = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(found.values()) and reloaded.config.model_type == "qwen3_5_text"
    assert not torch.equal(logits(reloaded), logits(whole))
    assert refuse_unusable(ModelSpec(config=ModelConfig(name=str(final)))).config.model_type == "qwen3_5_text"
