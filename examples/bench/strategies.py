"""What a strategy costs: memory of every worker and tokens per second, on one model.

    python -m examples.bench.strategies [--quick] [--workers 2]

Every side runs in fresh processes: DPO steps on random pairs, float32. Memory is what a worker holds at most beyond its
imports: while the model is loaded and spread, and in the steps after it. On a CPU all workers share the cores, so that
tokens per second tell what sharding adds, not what more devices gain.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import LlamaConfig

from rayalign.config.model import LoraConfig, ModelConfig
from rayalign.config.training import OptimConfig, StrategyConfig
from rayalign.data.group import Candidate, Group
from rayalign.data.micro_batches import count_step
from rayalign.data.pack import group_lengths, pack
from rayalign.engine.batches import StreamWork
from rayalign.engine.model.attention import first_kind
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import make_strategy
from rayalign.methods import resolve

from .common import arguments, machine, pairs_file, table, train_tokenizer

PAIRS, TOKENS = 2, 64
"""Pairs of every worker in a step; tokens of a prompt and of each completion."""
LORA = LoraConfig(rank=16, alpha=32.0)
SIDES: dict[str, tuple[StrategyConfig, dict[str, Any]]] = {
    "single": (StrategyConfig(), {}),
    "single, compiled": (StrategyConfig(), {"compile": True}),
    "single, checkpointed": (StrategyConfig(), {"gradient_checkpointing": True}),
    "ddp": (StrategyConfig(name="ddp"), {}),
    "fsdp2": (StrategyConfig(name="fsdp2"), {}),
    "fsdp2, checkpointed": (StrategyConfig(name="fsdp2"), {"gradient_checkpointing": True}),
    "deepspeed, ZeRO 2": (StrategyConfig(name="deepspeed", zero_stage=2), {}),
    "deepspeed, ZeRO 3": (StrategyConfig(name="deepspeed", zero_stage=3), {}),
    "ddp, LoRA": (StrategyConfig(name="ddp"), {"lora": LORA}),
    "fsdp2, LoRA": (StrategyConfig(name="fsdp2"), {"lora": LORA}),
    "deepspeed, ZeRO 3, LoRA": (StrategyConfig(name="deepspeed", zero_stage=3), {"lora": LORA}),
}
"""Each with what it changes of the model."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.hidden, options.layers = 3, 256, 4
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as name:
        folder = Path(name)
        os.environ["RAYALIGN_CACHE"] = str(folder / "cache")
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what a worker frees is the machine's again, and not counted
        config = write_configuration(folder / "model", hidden=options.hidden, layers=options.layers)
        for number, (side, (spec, changes)) in enumerate(SIDES.items()):
            package = "deepspeed" if spec.name == "deepspeed" else "peft" if "lora" in changes else "torch"
            if find_spec(package) is None:
                rows.append([side, f"({package} is not installed)", "", "", ""])
                continue
            workers = 1 if spec.name == "single" else options.workers
            room = folder / str(number)
            room.mkdir()
            multiprocessing.spawn(worker, args=(room, workers, spec, changes, options.steps), nprocs=workers)
            rows.append(row(side, [json.loads(path.read_text()) for path in sorted(room.glob("*.json"))]))
    print(f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {options.workers} workers; MiB per worker")
    print(table(["strategy", "parameters", "while loading", "in steps", "tokens/s"], rows))


def write_configuration(folder: Path, *, hidden: int, layers: int) -> LlamaConfig:
    """A model without weights, which every side draws with one seed."""
    tokenizer = train_tokenizer(pairs_file(), 4096)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return config


def worker(rank: int, room: Path, workers: int, spec: StrategyConfig, changes: dict[str, Any], steps: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    dist.init_process_group("gloo", init_method=f"file://{room}/meeting-point", rank=rank, world_size=workers)
    strategy = make_strategy(spec, torch.device("cpu"))
    imported = peak()
    model, _ = strategy.load(
        ModelSpec(config=ModelConfig(name=str(room.parent / "model"), from_scratch=True, **changes))
    )
    module, optimizer = strategy.wrap(root_module(model, first_kind(model.config, model.device)), OptimConfig(lr=1e-5))
    dpo = resolve("dpo")
    runner = Runner(
        module=module,
        objectives={MAIN_STREAM: Objective(stream=MAIN_STREAM, method=dpo, config=dpo.config())},
        strategy=strategy,
        compute_dtype=torch.float32,
        seed=0,
    )
    loading = peak() - imported
    work, seconds = work_of(rank, workers), []
    for step in range(steps):
        if step == 1:
            forget_peak()
        began = time.perf_counter()
        runner.step(step, [work], optimizer=optimizer, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - began)
    record = {
        "loading": loading,
        "steps": peak() - imported,
        "tokens_per_second": work.num_tokens / median(seconds[1:]),
        "parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()),
    }
    (room / f"{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def work_of(rank: int, workers: int) -> StreamWork:
    """This worker's pairs of a step."""
    random = np.random.default_rng(rank)

    def candidate() -> Candidate:
        ids = random.integers(4, 4096, TOKENS).astype(np.int32)
        return Candidate(ids=ids, mask=np.ones(TOKENS, np.bool_))

    groups = [
        Group(
            prompt_ids=random.integers(4, 4096, TOKENS).astype(np.int32),
            candidates=(candidate(), candidate()),
            source="bench",
            per_token={"ref_token_logp": np.full(2 * TOKENS, -8.0, np.float32)},
        )
        for _ in range(PAIRS)
    ]
    lengths = [group_lengths(group) for group in groups]
    counts = count_step(lengths)
    return StreamWork(
        stream=MAIN_STREAM,
        micro_batches=(pack(groups, positions=range(PAIRS), num_candidates=2, pad_id=0, row_tokens=512),),
        counts=replace(counts, pairs=counts.pairs * workers),
        groups_per_step=PAIRS * workers,
        epoch=0.0,
        num_tokens=workers * sum(length.packed for length in lengths),
    )


def peak() -> int:
    """Bytes of memory that this process held at most, since it was last asked to forget."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def row(side: str, records: list[dict[str, Any]]) -> list[str]:
    def sizes(name: str) -> str:
        return " ".join(f"{record[name] / 2**20:,.0f}" for record in records)

    tokens = min(record["tokens_per_second"] for record in records)
    return [side, f"{records[0]['parameters'] / 1e6:,.1f} M", sizes("loading"), sizes("steps"), f"{tokens:,.0f}"]


if __name__ == "__main__":
    main()
