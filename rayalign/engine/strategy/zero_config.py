"""DeepSpeed's settings: the run's own settings, and the user's JSON for everything that they leave open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayalign.config.training import OptimConfig, StrategyConfig
from rayalign.errors import UserError

ELSEWHERE = {
    "optimizer": "optim in the YAML says it",
    "scheduler": "optim.schedule in the YAML says it",
    "fp16": "parameters and optimizer are float32; model.dtype says what computes in bfloat16",
    "bf16": "parameters and optimizer are float32; model.dtype says what computes in bfloat16",
    "amp": "model.dtype says it",
    "torch_autocast": "model.dtype says it",
    "data_types": "gradients are averaged in float32",
    "communication_data_type": "gradients are averaged in float32",
    "train_batch_size": "optim.groups_per_step and optim.tokens_per_micro_batch say it",
    "train_micro_batch_size_per_gpu": "optim.tokens_per_micro_batch says it",
    "pipeline": "pipelines are not run",
    "elasticity": "strategy.workers says it",
    "zenflow": "updates would be late",
    "sparse_attention": "attention is the model's",
}
"""Blocks of a DeepSpeed file that have their place in the run's YAML, and which."""


def zero_config(strategy: StrategyConfig, optim: OptimConfig, file: str | None, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; ``file`` is the text of ``strategy.config``.

    Raises:
        UserError: ``strategy.config`` is no JSON object, or says otherwise than the YAML; every conflict is named.
    """
    user = user_config(file)
    ours = own_config(strategy, optim, bfloat16=bfloat16)
    problems = [f"remove {key}: {why}" for key, why in ELSEWHERE.items() if key in user]
    mine, theirs = dict(zero_settings(ours)), dict(zero_settings(user))
    problems += [
        f"{'.'.join(path)} is {theirs[path]!r} there and {value!r} by the YAML; remove it from the file"
        for path, value in mine.items()
        if path in theirs and theirs[path] != value
    ]
    problems += [
        f"{'.'.join(path)}: {value!r} is not run; write cpu"
        for path, value in theirs.items()
        if path[-1] == "device" and value not in ("cpu", "none")
    ]
    if theirs.get(("zero_optimization", "stage"), 2) not in (2, 3):
        problems.append("zero_optimization.stage: stages 2 and 3 are run; for neither write strategy: ddp")
    if problems:
        raise UserError(f"strategy.config: {'; '.join(problems)}")
    merged = overlay_settings(user, ours)
    merged["zero_optimization"].setdefault("stage", 2)
    return merged


def with_buckets(config: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """``config`` with what is sent at a time by the model's width (as transformers fills in ``auto``) where it is open.

    DeepSpeed's own portions are of 5e8 elements, 2 GB in float32, whatever the model is.
    """
    width = hidden_size**2
    by_stage = {
        2: {"reduce_bucket_size": width, "allgather_bucket_size": width},
        3: {
            "reduce_bucket_size": width,
            "stage3_prefetch_bucket_size": int(0.9 * width),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    }
    zero = config["zero_optimization"]
    return {**config, "zero_optimization": {**by_stage[zero["stage"]], **zero}}


def user_config(text: str | None) -> dict[str, Any]:
    """The user's object without what is ``auto``, which leaves the choice to the program that runs it."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"strategy.config: the file is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError("strategy.config: the file holds no JSON object")
    return without_auto(found)


def without_auto(block: Mapping[str, Any]) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    for key, value in block.items():
        left = without_auto(value) if isinstance(value, Mapping) else value
        is_emptied = left == {} and value != {}
        if left != "auto" and not is_emptied:
            cleaned[key] = left
    return cleaned


def own_config(strategy: StrategyConfig, optim: OptimConfig, *, bfloat16: bool) -> dict[str, Any]:
    """What the run's YAML says, and what exactness needs: see the design of micro-batches in ``engine/step.py``."""
    zero: dict[str, Any] = {} if strategy.zero_stage is None else {"stage": strategy.zero_stage}
    if strategy.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if strategy.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bfloat16:  # without safe modules, gradients are averaged in float32
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def zero_settings(block: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from zero_settings(value, (*path, key))
        elif not isinstance(value, Mapping):
            yield (*path, key), value


def overlay_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both[key] = (
            overlay_settings(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
        )
    return both
