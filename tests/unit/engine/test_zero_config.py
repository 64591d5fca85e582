"""What DeepSpeed is told, and which settings of the user's file are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayalign.config.training import OptimConfig, StrategyConfig
from rayalign.engine.strategy.zero_config import with_buckets, zero_config
from rayalign.errors import UserError

OPTIM = OptimConfig(max_grad_norm=0.5)


def told(user: Any = None, *, bfloat16: bool = False, **options: Any) -> dict[str, Any]:
    text = user if isinstance(user, str) or user is None else json.dumps(user)
    return zero_config(StrategyConfig(name="deepspeed", **options), OPTIM, text, bfloat16=bfloat16)


def test_micro_batches_are_the_loops_own() -> None:
    config = told()
    assert config["gradient_accumulation_steps"] == 1 and config["managed_gradient_accumulation"] is False
    assert config["gradient_clipping"] == 0.5 and config["zero_optimization"] == {"stage": 2}
    assert "torch_autocast" not in config


def test_bfloat16_is_computed_in_and_not_averaged_in() -> None:
    expected = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert told(bfloat16=True)["torch_autocast"] == expected


def test_offload_is_of_what_the_stage_shards() -> None:
    cpu = {"device": "cpu"}
    assert told(cpu_offload=True)["zero_optimization"] == {"offload_optimizer": cpu, "stage": 2}
    three = told(cpu_offload=True, zero_stage=3)["zero_optimization"]
    assert three == {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}


def test_a_file_says_what_the_yaml_leaves_open() -> None:
    user = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "optimizer": "auto",
        "wall_clock_breakdown": True,
    }
    config = told(user)
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True and "optimizer" not in config


def test_portions_are_of_the_models_width_where_the_file_does_not_say() -> None:
    assert with_buckets(told(), 64)["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 4096,
        "allgather_bucket_size": 4096,
    }
    user = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"}}
    assert with_buckets(told(user), 64)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
    }


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("[", "the file is not JSON"),
        ([1], "holds no JSON object"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8 there and 1 by the YAML"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 there and 0.5 by the YAML"),
        ({"bf16": {"enabled": True}}, "remove bf16: parameters and optimizer are float32"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "remove optimizer: optim in the YAML"),
        ({"zero_optimization": {"stage": 1}}, "stages 2 and 3 are run"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device: 'nvme' is not run"),
    ],
)
def test_conflicts_are_named(user: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"strategy.config: .*{message}"):
        told(user)


def test_every_conflict_is_in_one_message() -> None:
    with pytest.raises(UserError, match="remove fp16.*; zero_optimization.stage is 2 there and 3 by the YAML"):
        told({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, zero_stage=3)
