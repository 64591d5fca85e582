"""The real vLLM on this machine's CPU or GPU: the contract of every engine, and what a weight refresh must not do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from parrots import parrot
from tiny_runs import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayalign.config.model import ModelConfig
from rayalign.engine.canary import RESPONSE_TOKENS, canary_error, canary_logps
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.errors import UserError
from rayalign.judge import make_judge, make_scorer
from rayalign.judge.base import Asked
from rayalign.judge.evaluator import EvaluationSpec, Evaluator, PartToDraw, PartToMeasure, parts_of
from rayalign.judge.measure import Prompt
from rayalign.rollout.base import SamplingParams
from rayalign.testing import check_engine

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm installs it into an environment of its own")
from rayalign.rollout.vllm import VllmSampler  # noqa: E402  (only where vLLM is)

pytestmark = pytest.mark.slow
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 11, 12, 13], [3], [20, 21, 22, 23] * 40]
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def model_spec(directory: Path) -> ModelSpec:
    return ModelSpec(config=ModelConfig(name=str(directory), dtype="float32"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tied embeddings, whose head vLLM forgets to reload."""
    return save_tiny(tmp_path_factory.mktemp("first"), "llama_tied", **SHAPE)


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shape."""
    directory = tmp_path_factory.mktemp("second")
    model, tokenizer = load_policy(model_spec(first))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_pretrained(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def sampler(first: Path) -> Iterator[VllmSampler]:
    spec = ScoringSpec(model=model_spec(first), tokens_per_micro_batch=512, row_tokens=None)
    made = VllmSampler(spec)
    made.load(spec.model)
    yield made


def next_logits_of(directory: Path):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def next_logits(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()

    return next_logits


def test_the_contract_holds_before_and_after_a_refresh(sampler: VllmSampler, first: Path, second: Path) -> None:
    """The prompts are the same in both, so that a prefix cache which outlived the refresh would show."""
    sampler.load(model_spec(first))
    check_engine(sampler, next_logits_of(first), PROMPTS, tolerance=2e-5)
    sampler.load(model_spec(second))
    check_engine(sampler, next_logits_of(second), PROMPTS, tolerance=2e-5)


def test_the_canary_tells_weights_apart(sampler: VllmSampler, first: Path, second: Path) -> None:
    said = {}
    for directory in (first, second):
        model, _ = load_policy(model_spec(directory))
        said[directory] = canary_logps(model, layout="packed", dtype=torch.float32)
    for directory in (first, second, first):
        sampler.load(model_spec(directory))
        assert canary_error(said[directory], sampler.canary()) < 1e-4
    assert canary_error(said[second], sampler.canary()) > 1e-2


def test_weights_in_memory_refresh_it_like_a_folder(sampler: VllmSampler, first: Path, second: Path) -> None:
    sampler.load(model_spec(first))
    model, _ = load_policy(model_spec(second))
    sampler.load(model_spec(first), model.state_dict())
    assert canary_error(canary_logps(model, layout="packed", dtype=torch.float32), sampler.canary()) < 1e-4
    check_engine(sampler, next_logits_of(second), PROMPTS, tolerance=2e-5)


def test_a_part_of_a_fused_weight_does_not_go_unnoticed(sampler: VllmSampler, first: Path, second: Path) -> None:
    """Without v_proj vLLM says nothing and keeps what is left of query, key and value: the canary says it."""
    sampler.load(model_spec(first))
    model, _ = load_policy(model_spec(second))
    part = {name: tensor for name, tensor in model.state_dict().items() if "v_proj" not in name}
    expected = canary_logps(model, layout="packed", dtype=torch.float32)
    try:
        sampler.load(model_spec(first), part)
    except Exception as error:  # refusing it is as good
        assert "v_proj" in str(error)
        return
    assert canary_error(expected, sampler.canary()) > 1e-3


def test_a_prompt_that_does_not_fit_is_refused(sampler: VllmSampler, first: Path) -> None:
    sampler.load(model_spec(first))
    limit = int(sampler.llm.llm_engine.model_config.max_model_len)
    with pytest.raises(UserError, match=f"more than the model's context of {limit}"):
        sampler.generate([[1] * limit], SamplingParams(max_new_tokens=1))


def test_weights_without_a_folder_are_refused(sampler: VllmSampler, first: Path) -> None:
    with pytest.raises(UserError, match="from_scratch"):
        sampler.load(model_spec(first).at(first, from_scratch=True))


def test_generation_config_does_not_steer(first: Path, sampler: VllmSampler) -> None:
    """Temperature and end tokens come from the run alone."""
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert tokenizer.eos_token_id is not None
    sampler.load(model_spec(first))
    found = sampler.generate(PROMPTS, SamplingParams(max_new_tokens=40, num_samples=8))
    assert all(len(completion.token_ids) == 40 for completion in found)


def test_damaged_weights_do_not_answer(sampler: VllmSampler, first: Path, tmp_path: Path) -> None:
    """NaN weights make vLLM answer token 0 with NaN log-probabilities and no error of its own.

    What they leave in its cache outlives the next reload, so that such an engine is of no more use: the last test here.
    """
    model, tokenizer = load_policy(model_spec(first))
    next(model.parameters()).data.fill_(float("nan"))
    save_pretrained(model, tokenizer, tmp_path)
    sampler.load(model_spec(tmp_path))
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert canary_error((0.0,) * RESPONSE_TOKENS, sampler.canary()) == float("inf")


def test_an_evaluation_is_sampled_by_it_and_measured_beside_it(first: Path, second: Path) -> None:
    """Its log-probabilities are those of the model that measures, or the evaluation would end.

    An engine that ends takes the others of its process along, so that no test with ``sampler`` follows.
    """
    prompts = tuple(Prompt(ids=tuple(ids), prompt="") for ids in PROMPTS)
    spec = EvaluationSpec(
        reference=ScoringSpec(model=model_spec(first), tokens_per_micro_batch=512, row_tokens=None),
        prompt_sets={"all": prompts},
        sampling=SamplingParams(max_new_tokens=12, num_samples=4, seed=1),
        scorers=(),
        engine="vllm",
    )
    process, (part,) = Evaluator(spec), parts_of(spec)
    found = {}
    for number, subject in enumerate((None, second, None)):
        drawn = process(PartToDraw(subject=subject, part=part))
        found[number] = process(PartToMeasure(subject=subject, part=part, drawn=drawn)), drawn
    assert np.abs(found[0][0].k1).max() == 0 and found[1][0].k1.mean() > 0.05
    assert [own.token_ids for own in found[2][1].completions] == [own.token_ids for own in found[0][1].completions]


def test_a_judge_and_a_scorer_that_it_loads(tmp_path: Path) -> None:
    first, eight = (
        parrot(tmp_path / "a", "A", "<|im_end|>", **SHAPE),
        parrot(tmp_path / "8", "8", "<|im_end|>", **SHAPE),
    )
    judge = make_judge("llm", engine="vllm", model=str(first), max_new_tokens=4)
    scorer = make_scorer("llm", engine="vllm", model=str(eight), max_new_tokens=4)
    for _ in range(2):  # two engines in one process leave each other alone
        assert judge.compare(["why?"] * 3, ["a", "b", "same"], ["x", "y", "same"]) == [0.5, 0.5, 0.5]
        assert scorer.score(["why?"] * 3, ["because", "so", "no"]) == [8.0, 8.0, 8.0]
    assert judge.tally.asked == Asked(calls=8, ties=2, disagreements=4)
