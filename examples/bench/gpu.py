"""Training steps on one GPU: is it right there, how fast, and in how much memory, beside a plain padded loop.

    python -m examples.bench.gpu [--quick]

Nothing is downloaded: models have the shapes of Llama 3's 1B and 8B and random weights, and groups have lengths like
those of chats. Packed rows are compared with plain sequences first. Then the sides of a job run, each in a process of
its own. One is this project's step, the other a loop that pads pairs to the longest of a micro-batch. Both compute in
bfloat16 under autocast. MFU counts 6 FLOPs per parameter that a token meets, and the padding of neither side.
``--quick`` runs tiny shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayalign.config.model import LoraConfig
from rayalign.config.training import OptimConfig, StrategyConfig
from rayalign.data.group import Candidate, Group
from rayalign.data.micro_batches import count_step, plan_step
from rayalign.data.pack import group_lengths, pack
from rayalign.engine.batches import StreamWork
from rayalign.engine.loop import hold_base
from rayalign.engine.model.checkpointing import checkpoint_blocks
from rayalign.engine.model.forward import root_module
from rayalign.engine.model.lora import add_adapter
from rayalign.engine.model.parity import choose_attention, measure_attention
from rayalign.engine.model.pretrained import as_served
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.step import Runner
from rayalign.engine.strategy.base import make_strategy
from rayalign.methods import resolve

from .common import arguments, machine, table

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LENGTHS = {"short": (90, 60, 512), "long": (300, 350, 2048)}
"""Medians of prompt and answer in tokens, and the most of both: like HH's, and like UltraFeedback's."""
JOBS: dict[str, dict[str, Any]] = {
    "DPO 1B, short": {"shape": "1B", "lengths": "short", "method": "dpo", "k": 2},
    "DPO 1B, long": {"shape": "1B", "lengths": "long", "method": "dpo", "k": 2, "checkpointing": "selective"},
    "RLOO 1B, K = 8": {"shape": "1B", "lengths": "short", "method": "rloo", "k": 8, "checkpointing": "selective"},
    "DPO 8B LoRA, short": {"shape": "8B", "lengths": "short", "method": "dpo", "k": 2, "lora": True},
}
GROUPS, TOKENS, WARM, STEPS = 64, 16384, 2, 5
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs per second, as the makers give them."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run(json.loads(options.job))))
        return
    if not (options.quick or torch.cuda.is_available()):
        sys.exit("there is no CUDA device here: add --quick for tiny shapes on the CPU")
    print(machine())
    print(f"packed rows differ from plain sequences by {correctness():.2g} (log-probs in nats, and gradients)")
    rows = []
    for name, job in JOBS.items():
        asked = {**job, "shape": "tiny"} if options.quick else job
        for side in ("rayalign", "padded loop") if job["k"] == 2 else ("rayalign",):
            rows.append([name, side, *shown(asked | {"side": side, "quick": options.quick})])
    print(table(("job", "side", "s per step", "tokens/s", "groups/s", "MFU", "peak GiB"), rows))


def shown(job: dict[str, Any]) -> list[str]:
    """A row of the table; a side that fails says why."""
    command = [sys.executable, "-m", "examples.bench.gpu", "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [done.stderr.strip().splitlines()[-1][:60], "", "", "", ""]
    found = json.loads(done.stdout.splitlines()[-1])
    mfu = f"{found['mfu']:.0%}" if found["mfu"] is not None else "–"
    seconds = found["seconds"]
    rates = (f"{found['tokens'] / seconds:,.0f}", f"{found['groups'] / seconds:.1f}")
    return [f"{seconds:.3f}", *rates, mfu, f"{found['gib']:.1f}"]


def correctness() -> float:
    """The largest difference of the way that a run would choose."""
    model = as_served(made("tiny", device()))
    choose_attention(model)
    return min(measure_attention(model).values())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(shape: str, place: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=128256 if shape != "tiny" else 512, **SHAPES[shape], num_key_value_heads=4)
    config.tie_word_embeddings = shape != "8B"
    with place:
        return LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def groups_of(lengths: str, k: int, count: int, vocabulary: int) -> list[Group]:
    """Groups with log-normal lengths and random tokens, with the columns that the methods read."""
    draw = np.random.default_rng(0)
    prompt_median, answer_median, most = LENGTHS[lengths]

    def size(median: int, room: int) -> int:
        return int(np.clip(draw.lognormal(np.log(median), 0.6), 4, room))

    def ids(number: int) -> np.ndarray:
        return draw.integers(3, vocabulary, number).astype(np.int32)

    made = []
    for _ in range(count):
        prompt = ids(size(prompt_median, most // 2))
        answers = [ids(size(answer_median, most - len(prompt))) for _ in range(k)]
        candidates = tuple(Candidate(ids=answer, mask=np.ones(len(answer), dtype=bool)) for answer in answers)
        tokens = sum(map(len, answers))
        constant = np.full(tokens, -2.0, np.float32)
        rewards = {"reward": draw.normal(size=k).astype(np.float32)}
        names = ("ref_token_logp", "behavior_token_logp", "advantage")
        made.append(
            Group(
                prompt_ids=prompt,
                candidates=candidates,
                per_candidate=rewards,
                per_token=dict.fromkeys(names, constant),
            )
        )
    return made


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step, its tokens with every prompt counted once, and the peak of the device's memory."""
    place, count = device(), 8 if job["quick"] else GROUPS
    torch.manual_seed(0)
    model = as_served(made(job["shape"], place))
    parameters = sum(own.numel() for own in model.parameters())
    groups = groups_of(job["lengths"], job["k"], count, model.config.vocab_size)
    if job.get("lora"):
        add_adapter(model, LoraConfig(rank=16), seed=0)
    if job.get("checkpointing"):
        checkpoint_blocks(model, job["checkpointing"])
        as_served(model)
    steps = ours(model, groups, job, place) if job["side"] == "rayalign" else padded(model, groups, place)
    seconds = []
    for number in range(WARM + STEPS):
        began = time.perf_counter()
        steps()
        if place.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
    tokens = sum(lengths.packed for lengths in map(group_lengths, groups))
    middle = float(np.median(seconds))
    name = torch.cuda.get_device_name() if place.type == "cuda" else ""
    peak = next((flops for kind, flops in PEAK.items() if kind in name), None)
    work = (4 if job.get("lora") else 6) * parameters * tokens  # frozen weights have no gradient of their own
    return {
        "seconds": middle,
        "tokens": tokens,
        "groups": count,
        "mfu": work / middle / peak if peak is not None else None,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else 0.0,
    }


def ours(model: LlamaForCausalLM, groups: Sequence[Group], job: dict[str, Any], place: torch.device) -> Any:
    """The engine's own step, groups packed in rows."""
    strategy, method = make_strategy(StrategyConfig(name="single"), place), resolve(job["method"])
    policy = root_module(model, choose_attention(model, device=place))
    if job.get("lora"):
        hold_base(policy, strategy, torch.bfloat16)
    module, optimizer = strategy.wrap(policy, OptimConfig(lr=1e-6, steps=1), compute_dtype=torch.bfloat16)
    main = Objective(stream=MAIN_STREAM, method=method, config=method.config())
    runner = Runner(
        module=module, objectives={MAIN_STREAM: main}, strategy=strategy, compute_dtype=torch.bfloat16, seed=0
    )
    lengths = list(map(group_lengths, groups))
    plan = plan_step(lengths, num_workers=1, tokens_per_micro_batch=TOKENS, row_tokens=None, layout="packed")
    batches = [
        pack(
            [groups[slot] for slot in micro.slots], positions=list(micro.slots), num_candidates=job["k"], pad_id=0,
            row_tokens=None,
        )
        for micro in plan[0]
    ]  # fmt: skip
    work = StreamWork(
        stream=MAIN_STREAM, micro_batches=tuple(batches), counts=count_step(lengths), groups_per_step=len(groups),
        epoch=0.0, num_tokens=sum(length.packed for length in lengths),
    )  # fmt: skip
    return lambda: runner.step(0, [work], optimizer=optimizer, max_grad_norm=1.0)


def padded(model: LlamaForCausalLM, groups: Sequence[Group], place: torch.device) -> Any:
    """Pairs sorted by length and padded, prompt and answer as one sequence, logits of all positions."""
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for group in groups:
        rows += [(group.prompt_ids, answer.ids) for answer in group.candidates]
    rows.sort(key=lambda row: -len(row[0]) - len(row[1]))
    batches, width = [], 0
    for prompt, answer in rows:
        width = max(width, len(prompt) + len(answer)) if batches else len(prompt) + len(answer)
        if not batches or (len(batches[-1]) + 1) * width > TOKENS:
            batches.append([])
            width = len(prompt) + len(answer)
        batches[-1].append((prompt, answer))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            length = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids, seen = torch.zeros(2, len(batch), length, dtype=torch.long)
            for row, (prompt, answer) in enumerate(batch):
                ids[row, : len(prompt) + len(answer)] = torch.from_numpy(np.concatenate([prompt, answer]))
                seen[row, : len(prompt) + len(answer)] = 1
            ids, seen = ids.to(place), seen.to(place)
            with torch.autocast(place.type, dtype=torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
                logp = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
                loss = (logp * seen[:, 1:]).sum() / len(rows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
