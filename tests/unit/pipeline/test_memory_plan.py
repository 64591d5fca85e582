"""``rayalign train --dry-run``: the parts of a process's memory by hand, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import save_tiny
from tiny_tokenizers import CHATML, byte_level

from rayalign.config import load_run
from rayalign.config.run import RunConfig
from rayalign.errors import UserError
from rayalign.run.memory import cheaper, worker_memory
from rayalign.verbs.dry_train import dry_train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    save_tiny(folder / "model")
    byte_level(template=CHATML).save_pretrained(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return [f"model.name={folder / 'model'}", f"data.train={rows}", "method=dpo", "name=plan"]


def number_of_parameters(run: RunConfig) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.model.name)
    return sum(own.numel() for own in model.parameters())


@pytest.mark.parametrize(
    ("strategy", "workers", "expected"),
    [
        ("single", 1, (4, 4, 8)),
        ("{name: ddp, workers: 4}", 4, (4, 4, 8)),
        ("{name: fsdp2, workers: 4}", 4, (1, 1, 2)),
        ("{name: fsdp2, workers: 4, shard: 2}", 4, (2, 2, 4)),
        ("{name: fsdp2, workers: 4, sync_every_micro_batch: false}", 4, (1, 4, 2)),
        ("{name: fsdp2, workers: 4, cpu_offload: true}", 4, (0, 0, 0)),
        ("{name: deepspeed, workers: 4, zero_stage: 2}", 4, (4, 1, 3)),
        ("{name: deepspeed, workers: 4, zero_stage: 3}", 4, (1, 1, 3)),
    ],
)
def test_state_is_spread(settings: list[str], strategy: str, workers: int, expected: tuple[float, ...]) -> None:
    """Bytes per parameter."""
    run = load_run(None, [*settings, f"strategy={strategy}"])
    found = worker_memory(run, device=CPU, workers=workers).parts
    total = number_of_parameters(run)
    kinds = ("parameters", "gradients", "optimizer")
    assert [found.get(kind, 0) / total for kind in kinds] == pytest.approx(list(expected), rel=0.01)


def test_an_adapter_trains_its_own_weights_alone(settings: list[str]) -> None:
    run = load_run(None, [*settings, "model.lora.rank=4", "model.dtype=bfloat16"])
    found = worker_memory(run, device=CPU, workers=1)
    assert found.parts["optimizer"] == 2 * found.parts["gradients"]
    adapter = found.parts["gradients"] // 4
    assert found.parts["parameters"] == 2 * number_of_parameters(run) + 4 * adapter
    assert any("bfloat16 files" in remark for remark in found.remarks)


def test_a_reference_beside_the_policy_is_counted(settings: list[str]) -> None:
    pool, trainer = (load_run(None, [*settings, f"reference.place={place}"]) for place in ("pool", "trainer"))
    beside, ahead = (worker_memory(run, device=CPU, workers=1) for run in (trainer, pool))
    assert beside.total - ahead.total == beside.parts["reference"] == 4 * number_of_parameters(trainer)


def test_a_critic_is_counted(settings: list[str]) -> None:
    drawn = ["data_policy=on_policy", "rollout.samples=2", "scorer={name: rule, function: 'm:f'}", "method=ppo"]
    found = worker_memory(load_run(None, [*settings, *drawn]), device=CPU, workers=1).parts
    head = 4 * 4  # bytes of parameter, gradient and moments
    assert found["critic"] < found["parameters"] + found["gradients"] + found["optimizer"] + head * 64


@pytest.mark.parametrize("workers", [1, 4])
def test_every_setting_lowers_what_those_before_it_left(settings: list[str], workers: int) -> None:
    run = load_run(None, [*settings, "strategy={name: ddp, workers: 4}" if workers > 1 else "strategy=single"])
    totals = [worker_memory(run, device=CPU, workers=workers).total]
    for _, changed in cheaper(run, workers):
        totals.append(worker_memory(changed, device=CPU, workers=workers).total)
    assert len(totals) > 2 and totals == sorted(totals, reverse=True)


def planned(settings: list[str], **options: Any) -> str:
    console = Console(width=100, record=True)
    dry_train(None, settings, console=console, **options)
    return console.export_text()


def test_what_fits_is_printed(settings: list[str]) -> None:
    told = planned(settings, device_gib=80.0)
    assert "the training process on a GPU of 80.0 GiB" in told and "together" in told
    assert "not compared" in planned(settings, device_gib=None)


def test_what_does_not_fit_is_refused_with_what_would(settings: list[str], tmp_path: Path) -> None:
    many = [*settings, "optim.tokens_per_micro_batch=40000000"]
    console = Console(width=100, record=True)
    with pytest.raises(UserError, match=r"GiB do not fit into 90% of 80\.0 GiB"):
        dry_train(None, many, device_gib=80.0, console=console)
    told = console.export_text()
    assert "model.gradient_checkpointing=true:" in told and "optim.tokens_per_micro_batch=20000000:" in told
