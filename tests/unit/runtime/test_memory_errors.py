"""A device whose memory is full ends with the settings that lower it, and not with a traceback."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from rayalign.config.model import ModelConfig
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.state import TrainSpec
from rayalign.errors import UserError
from rayalign.runtime.worker import memory_errors

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"


@dataclass
class Trained:
    """What the message reads of a run."""

    model: ModelSpec = field(default_factory=lambda: ModelSpec(config=ModelConfig(name="m")))


def spec(*, checkpointed: bool) -> TrainSpec:
    config = ModelConfig(name="m", gradient_checkpointing=checkpointed)
    return cast(TrainSpec, Trained(model=ModelSpec(config=config)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_full_device_names_what_lowers_its_memory(checkpointed: bool) -> None:
    with pytest.raises(UserError) as caught, memory_errors(spec(checkpointed=checkpointed)):
        raise torch.OutOfMemoryError(FULL)
    told = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in told and "\n" not in told
    assert "optim.tokens_per_micro_batch" in told and "--dry-run" in told
    assert ("gradient_checkpointing" in told) is not checkpointed


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="^size mismatch$"), memory_errors(spec(checkpointed=False)):
        raise RuntimeError("size mismatch")
