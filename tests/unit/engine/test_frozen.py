"""The reference's log-probs are those of each sequence alone, and those that training computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import CPU, save_tiny, synthetic_groups
from transformers import AutoModelForCausalLM

from rayalign.config.model import ModelConfig
from rayalign.data.group import Group
from rayalign.data.micro_batches import PlanError
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec

GROUPS = synthetic_groups([2, 1, 4, 3, 2, 2])


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module", params=["llama", "bloom"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ScoringSpec:
    """A family that reads packed rows, and one that reads whole sequences only."""
    directory = save_tiny(tmp_path_factory.mktemp("frozen") / request.param, request.param)
    return ScoringSpec(
        model=ModelSpec(config=ModelConfig(name=str(directory))), tokens_per_micro_batch=120, row_tokens=60
    )


def plain(spec: ScoringSpec, groups: Sequence[Group], *, temperature: float = 1.0) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(spec.model.name)
    columns = []
    for group in groups:
        parts = []
        for candidate in group.candidates:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, candidate.ids])).long()
            with torch.no_grad():
                logp = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(dim=-1)
            own = logp.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0]
            parts.append(own.numpy()[candidate.mask])
        columns.append(np.concatenate(parts))
    return columns


def assert_close(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    assert [column.shape for column in found] == [column.shape for column in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_log_probs_are_those_of_each_sequence_alone(spec: ScoringSpec) -> None:
    model = FrozenModel(spec, CPU)
    assert_close(model.token_logps(GROUPS), plain(spec, GROUPS))
    assert not any(parameter.requires_grad for parameter in model.policy.parameters())


def test_order_and_budget_do_not_matter(spec: ScoringSpec) -> None:
    one_row = FrozenModel(replace(spec, tokens_per_micro_batch=100_000, row_tokens=None), CPU)
    backwards = FrozenModel(spec, CPU).token_logps(GROUPS[::-1])
    assert_close(backwards[::-1], one_row.token_logps(GROUPS))


def test_temperature_divides_the_logits(spec: ScoringSpec) -> None:
    warm = FrozenModel(replace(spec, logit_temperature=2.0), CPU)
    assert_close(warm.token_logps(GROUPS), plain(spec, GROUPS, temperature=2.0))


def test_only_predicted_tokens_are_scored(spec: ScoringSpec) -> None:
    (candidate,) = GROUPS[1].candidates
    mask = np.arange(len(candidate.ids)) % 2 == 0
    partly = replace(GROUPS[1], candidates=(replace(candidate, mask=mask),))
    model = FrozenModel(spec, CPU)
    (masked,), (whole,) = model.token_logps([partly]), model.token_logps([GROUPS[1]])
    np.testing.assert_allclose(masked, whole[mask], atol=1e-6)


def test_no_group_no_column_and_a_large_group_is_named(spec: ScoringSpec) -> None:
    assert FrozenModel(spec, CPU).token_logps([]) == []
    with pytest.raises(PlanError, match=r"synthetic\.jsonl:\d takes"):
        FrozenModel(replace(spec, tokens_per_micro_batch=20), CPU).token_logps(GROUPS)
