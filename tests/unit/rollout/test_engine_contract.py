"""One contract for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine
from tiny_models import tiny
from tiny_runs import save_tiny
from torch import Tensor

from rayalign.config.model import ModelConfig
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.rollout.base import Completion, SamplingParams
from rayalign.rollout.engines import HfSampler
from rayalign.rollout.hf import HfEngine
from rayalign.testing import check_engine

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 11, 12, 13], [3], [20, 21, 22, 23]]
LOGITS = [0.0, 1.0, 2.0, -1.0, 0.5, 0.25, 1.5, -0.5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_windowed", "gemma2"])
def test_the_embedded_engine(family: str) -> None:
    model = tiny(family)

    def next_logits(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()

    check_engine(HfEngine(model), next_logits, PROMPTS, tolerance=2e-5)


def test_the_embedded_engine_around_a_checkpoint(tmp_path: Path) -> None:
    """As a rollout pool holds it: loaded through the training forward's loader."""
    spec = ModelSpec(config=ModelConfig(name=str(save_tiny(tmp_path))))
    sampler = HfSampler(ScoringSpec(model=spec, tokens_per_micro_batch=512, row_tokens=None), torch.device("cpu"))
    sampler.load(spec)
    model = sampler.policy.policy.model

    def next_logits(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()

    check_engine(sampler, next_logits, PROMPTS, tolerance=2e-5)


def test_the_fake_engine() -> None:
    check_engine(FakeEngine(LOGITS), lambda ids: torch.tensor(LOGITS), PROMPTS)


def test_a_known_nucleus() -> None:
    """Top-p 0.9 of (.5, .3, .15, .05) keeps the first three; they are drawn as .526, .316, .158."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    engine = FakeEngine(probabilities.log().tolist())
    (one, *_) = engine.generate([[0]], SamplingParams(top_p=0.9, max_new_tokens=4000))
    shares = torch.bincount(torch.tensor(one.token_ids), minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5263, 0.3158, 0.1579, 0.0], abs=0.025)  # 3 standard errors
    of_first = next(logp for token, logp in zip(one.token_ids, one.behavior_token_logp, strict=True) if token == 0)
    assert of_first == pytest.approx(-0.6419, abs=1e-4)  # ln(.5 / .95)


class WrongLogp(FakeEngine):
    """Says the log-probability before truncation."""

    def generate(self, *positional: object, **named: object) -> list[Completion]:
        from dataclasses import replace

        found = super().generate(*positional, **named)  # type: ignore[arg-type]
        return [replace(completion, behavior_token_logp=completion.sampler_logp) for completion in found]


class Repeats(FakeEngine):
    """Every sample of a prompt is its first."""

    def _completion(self, index: int, sample: int, key: int, params: SamplingParams) -> Completion:
        from dataclasses import replace

        return replace(super()._completion(index, 0, key, params), sample_index=sample)


@pytest.mark.parametrize(("broken", "message"), [(WrongLogp, "greedy|behavior"), (Repeats, "samples of one prompt")])
def test_the_contract_notices(broken: type[FakeEngine], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_engine(broken(LOGITS), lambda ids: torch.tensor(LOGITS), PROMPTS)
