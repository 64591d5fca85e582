"""One measured process of ``offline_step``: reads a job, trains (or scores the reference), writes what it saw.

python -m examples.bench.offline_sides job.json answer.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rayalign.config.model import ModelConfig
from rayalign.config.training import CheckpointConfig, OptimConfig
from rayalign.data.rows import Layout
from rayalign.data.shard import finished_shards, write_column_shard
from rayalign.data.store import TokenStore, commit_columns
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.loop import train_policy
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy
from rayalign.methods import resolve
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import SourceSpec, StoredStream
from rayalign.runtime.session import CPU_ROW_TOKENS

GROUPS_PER_SHARD = 256
LR, BETA, MAX_GRAD_NORM = 1e-4, 0.1, 1.0


class Memory:
    """Peak of this process's resident set above what it is now, in bytes (Linux)."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self.resident = self.read("VmRSS")

    def peak(self) -> int:
        return self.read("VmHWM") - self.resident

    @staticmethod
    def read(name: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:")) * 1024


def rayalign_reference(job: Mapping[str, Any]) -> dict[str, Any]:
    """Score the store and commit the columns, as the actors of the reference stage do."""
    store, columns = TokenStore.open(job["store"]), Path(job["columns"])
    spec = ScoringSpec(
        model=ModelSpec(config=ModelConfig(name=job["model"])),
        tokens_per_micro_batch=job["tokens_per_micro_batch"],
        row_tokens=CPU_ROW_TOKENS,
    )
    model = FrozenModel(spec, torch.device("cpu"))
    began = time.perf_counter()
    for first in range(0, len(store), GROUPS_PER_SHARD):
        groups = [store[index] for index in range(first, min(first + GROUPS_PER_SHARD, len(store)))]
        logps = model.token_logps(groups)
        write_column_shard(columns, f"{first:010d}", first=first, per_token={"ref_token_logp": logps})
    commit_columns(columns, store, finished_shards(columns).values(), meta={})
    return {"reference_seconds": time.perf_counter() - began}


def training(job: Mapping[str, Any], directory: Path) -> tuple[TrainSpec, SourceSpec]:
    """The run that every benchmark trains: DPO on the job's store, its reference already scored."""
    dpo = resolve("dpo")
    stream = StoredStream(
        name=MAIN_STREAM,
        stores=(Path(job["store"]),),
        columns=((Path(job["columns"]),),),
        weights=(1.0,),
        groups_per_step=job["batch"],
        num_candidates=2,
    )
    source = SourceSpec(
        streams=(stream,),
        seed=0,
        tokens_per_micro_batch=job["tokens_per_micro_batch"],
        row_tokens=CPU_ROW_TOKENS,
    )
    spec = TrainSpec(
        directory=directory,
        model=ModelSpec(config=ModelConfig(name=job["model"])),
        objectives=(Objective(stream=MAIN_STREAM, method=dpo, config=dpo.config(beta=BETA)),),  # type: ignore[call-arg]
        optim=OptimConfig(lr=LR, schedule="constant", max_grad_norm=MAX_GRAD_NORM, warmup=0),
        steps=job["steps"],
        seed=0,
        identity={},
        checkpoint=CheckpointConfig(every=job["steps"], keep=1),
        check_initial_logratio=True,
    )
    return spec, source


def rayalign_train(job: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's own loop in this process, its metrics file and its check of the first step included."""
    rows: list[dict[str, Any]] = []
    stamps: list[float] = []
    cpu: list[float] = []
    memory: list[Memory] = []
    peak = 0

    def on_step(row: Mapping[str, Any]) -> None:
        nonlocal peak
        rows.append(dict(row))
        stamps.append(time.perf_counter())
        cpu.append(time.process_time())
        peak = memory[0].peak()

    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as directory:
        spec, source = training(job, Path(directory))

        def make_batches(layout: Layout, pad_id: int) -> StreamSource:
            memory.append(Memory())
            stamps.append(time.perf_counter())
            cpu.append(time.process_time())
            return StreamSource(source, layout=layout, pad_id=pad_id)

        train_policy(spec, make_batches, make_strategy("single", torch.device("cpu")), on_step=on_step)
    cells = round(sum(row["step_tokens"] / (1 - row["padding_share"]) for row in rows))
    return {
        "seconds": stamps[-1] - stamps[0],
        "cpu_seconds": cpu[-1] - cpu[0],
        "losses": [row["loss"] for row in rows],
        "cells": cells,
        "padding": 1 - sum(row["step_tokens"] for row in rows) / cells,
        "step_seconds": [row["seconds"] for row in rows],
        "first_step_at": time.time() - (stamps[-1] - stamps[1]),
        "peak_bytes": peak,
    }


def trl(job: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer over the same token ids; neither logs, evaluates nor saves anything."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    seen: dict[str, float] = {"reference_seconds": 0.0, "reference_cpu": 0.0, "cells": 0, "tokens": 0}
    losses: list[float] = []

    class Pretokenized(DPOTrainer):
        """Takes the dataset as it is, and says how long the reference took."""

        def _prepare_dataset(self, dataset: Any, *ignored: Any, **named: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *positional: Any, **named: Any) -> Any:
            began = time.perf_counter()
            scored = super()._precompute_ref_logps(*positional, **named)
            seen["reference_seconds"] += time.perf_counter() - began
            return scored

        def compute_loss(self, model: Any, inputs: Any, *positional: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *positional, **named)
            seen["cells"] += inputs["attention_mask"].numel()
            seen["tokens"] += int(inputs["attention_mask"].sum())
            losses.append(float(loss.detach()))
            return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, *ignored: Any, **named: Any) -> None:
            self.memory = Memory()
            self.began = time.perf_counter()
            self.cpu = time.process_time()

        def on_step_end(self, *ignored: Any, **named: Any) -> None:
            seen["seconds"] = time.perf_counter() - self.began
            seen["cpu_seconds"] = time.process_time() - self.cpu
            seen["peak_bytes"] = self.memory.peak()

    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as directory:
        config = DPOConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=job["batch"],
            max_steps=job["steps"],
            max_length=job["max_tokens"],
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=0.0,
            gradient_checkpointing=False,
            precompute_ref_log_probs=job["precompute"],
            train_sampling_strategy=job["sampling"],
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Pretokenized(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            args=config,
            train_dataset=datasets.load_from_disk(job["dataset"]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Watch()],
        )
        if trainer.ref_model is not None:
            time_forwards(trainer.ref_model, seen)
        inside = -seen["reference_seconds"]
        trainer.train()
        inside += seen["reference_seconds"]
    return {**seen, "reference_inside": inside, "losses": losses, "padding": 1 - seen["tokens"] / seen["cells"]}


def time_forwards(model: torch.nn.Module, seen: dict[str, float]) -> None:
    """Add the seconds of every forward of ``model`` to ``seen["reference_seconds"]``."""

    def before(*ignored: Any) -> None:
        seen["reference_seconds"] -= time.perf_counter()
        seen["reference_cpu"] -= time.process_time()

    def after(*ignored: Any) -> None:
        seen["reference_seconds"] += time.perf_counter()
        seen["reference_cpu"] += time.process_time()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


SIDES = {"rayalign reference": rayalign_reference, "rayalign": rayalign_train, "trl": trl}


def main(question: str, answer: str) -> None:
    job = json.loads(Path(question).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    Path(answer).write_text(json.dumps(SIDES[job["side"]](job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
