"""An evaluation in parts gives the numbers of the whole, whoever works on which part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import CPU, save_tiny
from transformers import AutoModelForCausalLM

from rayalign.config.model import ModelConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.judge import evaluator
from rayalign.judge.evaluator import EvaluationSpec, Evaluator, Part, PartToDraw, PartToMeasure, parts_of, ranges
from rayalign.judge.measure import Measured, Prompt, joined_rows, measure_samples, sample_replies
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import FrozenEngine
from rayalign.rollout.hf import HfEngine

SAMPLES, NEW = 2, 10
RULE = "def length(prompt, reply):\n    return len(reply)\n"


def model_in(directory: Path) -> ModelSpec:
    return ModelSpec(config=ModelConfig(name=str(directory)))


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluator")
    save_tiny(folder / "reference")
    save_tiny(folder / "step_000001-a", initializer_range=0.3)
    (folder / "rules.py").write_text(RULE)
    return folder


@pytest.fixture(scope="module")
def spec(folder: Path) -> EvaluationSpec:
    """Prompts of 3 to 9 tokens, in two sets."""
    prompts = tuple(Prompt(ids=tuple(range(40 + n, 43 + n + n % 7)), prompt=f"question {n}") for n in range(14))
    return EvaluationSpec(
        reference=ScoringSpec(model=model_in(folder / "reference"), tokens_per_micro_batch=512, row_tokens=128),
        prompt_sets={"first": prompts[:11], "second": prompts[11:]},
        sampling=SamplingParams(max_new_tokens=NEW, num_samples=SAMPLES, seed=3, stop_ids=(4,)),
        scorers=(RuleScorerConfig(function=f"{folder}/rules.py:length"),),
    )


def measured(spec: EvaluationSpec, subject: Any, *, processes: int = 1) -> dict[str, Measured]:
    """What ``processes`` evaluators find, the parts dealt out in turns."""
    team = [Evaluator(spec) for _ in range(processes)]
    parts = parts_of(spec)
    drawn = [team[n % processes](PartToDraw(subject=subject, part=part)) for n, part in enumerate(parts)]
    found = [
        team[-1 - n % processes](PartToMeasure(subject=subject, part=part, drawn=own))
        for n, (part, own) in enumerate(zip(parts, drawn, strict=True))
    ]
    by_part = dict(zip(parts, found, strict=True))
    return {
        name: joined_rows([by_part[part] for part in parts if part.prompt_set == name])  # type: ignore[misc]
        for name in spec.prompt_sets
    }


@pytest.mark.parametrize("tokens", [1, 60, 130])
def test_parts_change_no_number(
    tokens: int, spec: EvaluationSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = folder / "step_000001-a"
    whole = measured(spec, subject)
    assert len(parts_of(spec)) == 2
    monkeypatch.setattr(evaluator, "TOKENS_PER_PART", tokens)
    assert len(parts_of(spec)) > 2
    found = measured(spec, subject, processes=2)
    for name, expected in whole.items():
        assert found[name].replies == expected.replies
        for table in ("k1", "kl_rb", "length", "finished"):
            np.testing.assert_allclose(getattr(found[name], table), getattr(expected, table), atol=1e-5)
        assert np.array_equal(found[name].scores["length"], expected.scores["length"])
    assert np.abs(whole["first"].k1).max() > 0.1


def test_a_sample_hangs_on_its_place_in_the_set(spec: EvaluationSpec, folder: Path) -> None:
    """The plain model of the folder, asked for the same places alone."""
    part = Part(prompt_set="first", places=range(4, 9))
    drawn = Evaluator(spec)(PartToDraw(subject=folder / "step_000001-a", part=part))
    engine = HfEngine(AutoModelForCausalLM.from_pretrained(folder / "step_000001-a"))
    prompts = [spec.prompt_sets["first"][place].ids for place in part.places]
    expected = engine.generate(prompts, spec.sampling, keys=part.places)
    assert [own.token_ids for own in drawn.completions] == [own.token_ids for own in expected]


def test_the_reference_is_loaded_once_and_one_policy_at_a_time(spec: EvaluationSpec, folder: Path) -> None:
    one, other = folder / "step_000001-a", replace(model_in(folder / "step_000001-a"), seed=1)
    process, part = Evaluator(spec), Part(prompt_set="second", places=range(3))
    for subject in (None, one, other, one):
        drawn = process(PartToDraw(subject=subject, part=part))
        process(PartToMeasure(subject=subject, part=part, drawn=drawn))
        assert len(process.held) == (1 if subject is None else 2)
    reference = process.held[spec.reference.model]
    process(PartToMeasure(subject=None, part=part, drawn=process(PartToDraw(subject=None, part=part))))
    assert process.held[spec.reference.model] is reference


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], [range(0, 0)]),
        ([1], [range(0, 1)]),
        ([10**9], [range(0, 1)]),
        ([1, 10**9, 1], [range(0, 1), range(1, 2), range(2, 3)]),
        ([900] * 300, [range(0, 131), range(131, 262), range(262, 300)]),
    ],
)
def test_parts_are_bounded_by_their_tokens(lengths: list[int], expected: list[range]) -> None:
    """Two samples of up to 100 new tokens: 262,144 / (2 · 1,000) is 131."""
    assert ranges(lengths, SamplingParams(num_samples=2, max_new_tokens=100)) == expected


def test_samples_of_other_weights_are_refused(spec: EvaluationSpec, folder: Path) -> None:
    """What an engine would do that kept the weights of the policy before."""
    policy, other = (
        FrozenModel(replace(spec.reference, model=model_in(folder / name)), CPU)
        for name in ("step_000001-a", "reference")
    )
    prompts = spec.prompt_sets["first"]
    drawn = sample_replies(FrozenEngine(other), prompts, spec.sampling, tokenizer=load_tokenizer(folder / "reference"))
    with pytest.raises(
        UserError, match=r"the engine gave its samples other log-probabilities than .*step_000001-a has"
    ):
        measure_samples(policy, other, prompts, drawn, {})
    measure_samples(other, policy, prompts, drawn, {})
