"""How rows are read is proven family by family: recurrent layers, counted positions and models without a cache."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from causal_zoo import animal
from tiny_models import tiny
from transformers import PreTrainedModel

from rayalign.errors import UserError
from rayalign.rollout import reading
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.hf import HfEngine
from rayalign.rollout.reading import choose_reading

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 11, 12, 13], [3], [20, 21, 22, 23], [31, 32, 33]]
FAMILIES = {
    "llama": "padded", "gpt2": "padded", "cohere2": "padded", "bloom": "even", "mpt": "even", "trocr": "even",
    "qwen3_next": "even", "qwen3_5_text": "even", "jamba": "even", "bamba": "even", "lfm2": "even",
    "granitemoehybrid": "even", "kimi_linear": "even", "nemotron_h": "even", "mamba": "whole", "rwkv": "whole",
    "minimax": "whole",
}  # fmt: skip
"""Family → how its rows are read. ``trocr`` counts its positions from the left, filling included."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def plain(model: PreTrainedModel, prompt: list[int], ids: tuple[int, ...]) -> list[float]:
    whole = torch.tensor([[*prompt, *ids]])
    logp = model(input_ids=whole).logits[0, :-1].float().log_softmax(dim=-1)
    return logp.gather(1, whole[0, 1:, None])[len(prompt) - 1 :, 0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_log_probs_of_a_plain_forward(family: str) -> None:
    model = animal(family)
    engine = HfEngine(model)
    assert engine.reading == FAMILIES[family]
    params = SamplingParams(max_new_tokens=12, num_samples=3, stop_ids=(2, 7, 30, 31, 32))
    completions = engine.generate(PROMPTS, params)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}  # rows left the batch early
    for completion in completions:
        expected = plain(model, PROMPTS[completion.prompt_index], completion.token_ids)
        assert completion.sampler_logp == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_draws_do_not_depend_on_how_rows_are_read() -> None:
    model = tiny("llama")
    params = SamplingParams(max_new_tokens=8, num_samples=2)
    drawn = [HfEngine(model, reading=own).generate(PROMPTS, params) for own in ("padded", "even", "whole")]
    assert all([c.token_ids for c in other] == [c.token_ids for c in drawn[0]] for other in drawn[1:])


def test_the_proof_is_kept_and_a_slow_way_is_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_reading(animal("mamba")) == "whole"
    assert "mamba models are sampled without a cache" in caplog.text
    assert len(list((cache / "sampling").iterdir())) == 1
    assert choose_reading(animal("mamba")) == "whole"
    assert len(list((cache / "sampling").iterdir())) == 1


def test_a_way_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that counts filling is read evenly although it takes position ids; one that nothing reads is refused."""
    errors = {"padded": 0.3, "even": 2e-6, "whole": 1e-6}
    monkeypatch.setattr(reading, "error_of", lambda engine: errors[engine.reading])
    assert choose_reading(tiny("llama")) == "even"
    errors.update(even=4e-4)
    assert choose_reading(tiny("qwen2")) == "whole"  # the one that is exact, where another is only near
    errors.update(even=1.0, whole=2.0)
    with pytest.raises(UserError, match=r"hf cannot sample olmo models: .*padded: 0.3; even: 1.0; whole: 2.0"):
        choose_reading(tiny("olmo"))
