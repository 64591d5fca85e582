"""DPO on stored pairs: this engine's loop and TRL's ``DPOTrainer``, side by side on the CPU.

    python -m examples.bench.offline_step [--quick]

Both sides train the same 4-layer Llama in float32 on the same token ids for the same number of optimizer steps. Each
has a process of its own, and they take turns. That both compute the same losses is asserted; nothing is about time.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import datasets
from transformers import LlamaConfig

from rayalign.config.data import TokenBudget
from rayalign.data.chat import make_chat
from rayalign.data.group import Group, GroupLengths
from rayalign.data.pack import group_lengths
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.data.stream import Stream
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.engine.objective import MAIN_STREAM

from .common import (
    arguments,
    in_fresh_process,
    machine,
    matmul_peak,
    pairs_file,
    spread,
    table,
    train_tokenizer,
    write_model,
)

TOKENIZER_VOCABULARY = 8192
MAX_TOKENS, MAX_PROMPT_TOKENS = 512, 384
TOKENS_PER_MICRO_BATCH = 8192
LOSS_TOLERANCE = 2e-3
"""Nats: float32 rounding, grown over the steps of a run."""

OURS, DEFAULT, BEST = "rayalign", "TRL, default", "TRL, reference precomputed, sorted by length"
Record = dict[str, Any]


def main() -> None:
    options = parse()
    datasets.disable_progress_bars()
    file = pairs_file()
    tokenizer = train_tokenizer(file, TOKENIZER_VOCABULARY)
    print(machine())
    peak = matmul_peak(options.threads)
    print(f"{options.threads} threads; float32 matrix products of 2048³ reach {peak / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder:
        root = Path(folder)
        groups = tokenized_pairs(file, tokenizer, options.pairs)
        write_data(root, groups, batch=options.batch)
        lengths = [group_lengths(group) for group in groups]
        for vocabulary in options.vocabulary:
            config = write_model(root / f"model-{vocabulary}", tokenizer, vocabulary)
            jobs = make_jobs(root, vocabulary, options)
            check_losses(jobs, root, options.threads)
            runs = alternate(jobs, repeats=options.repeats, threads=options.threads)
            print(
                f"\nvocabulary {vocabulary}: {len(groups)} pairs in batches of {options.batch}, runs {options.repeats}"
            )
            print(render(runs, lengths, config, peak))


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, taking turns")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 32768], help="sizes of the model's")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.repeats, options.vocabulary = 64, 1, options.vocabulary[:1]
    return options


def tokenized_pairs(file: Path, tokenizer: Any, count: int) -> list[Group]:
    """The first ``count`` good pairs of the file; prompts are cut from the left, responses from the right."""
    chat = make_chat(tokenizer)
    settings = TokenBudget(max_prompt_tokens=MAX_PROMPT_TOKENS, max_tokens=MAX_TOKENS)
    groups: list[Group] = []
    for rows in read_chunks(Unit(path=str(file))):
        outcomes = rows_to_groups(rows, chat, settings)
        groups += [outcome.group for outcome in outcomes if isinstance(outcome, Tokenized)]
        if len(groups) >= count:
            break
    return groups[:count]


def write_data(root: Path, groups: Sequence[Group], *, batch: int) -> None:
    """The same pairs as a token store, and as TRL's columns in three orders."""
    commit_store(root / "store", [write_shard(root / "store", "pairs", groups)], meta={})
    order = Stream(name=MAIN_STREAM, sizes=(len(groups),), weights=(1.0,), groups_per_step=batch, seed=0)
    orders = {
        "as-is": range(len(groups)),
        "ours": [order.row(position)[1] for position in range(len(groups))],
        "sorted": sorted(range(len(groups)), key=lambda index: longest(groups[index])),
    }
    for name, indices in orders.items():
        rows = [columns(groups[index]) for index in indices]
        datasets.Dataset.from_list(rows).save_to_disk(root / name)


def longest(group: Group) -> int:
    return len(group.prompt_ids) + max(len(candidate.ids) for candidate in group.candidates)


def columns(group: Group) -> dict[str, list[int]]:
    """A pair as TRL's collator takes it."""
    chosen, rejected = group.candidates
    return {
        "prompt_ids": group.prompt_ids.tolist(),
        "chosen_ids": chosen.ids.tolist(),
        "rejected_ids": rejected.ids.tolist(),
    }


def make_jobs(root: Path, vocabulary: int, options: argparse.Namespace) -> dict[str, Record]:
    common: Record = {
        "model": str(root / f"model-{vocabulary}"),
        "store": str(root / "store"),
        "batch": options.batch,
        "steps": options.pairs // options.batch,
        "max_tokens": MAX_TOKENS,
        "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
    }
    theirs = common | {"side": "trl", "precompute": False}
    return {
        OURS: common | {"side": "rayalign"},
        DEFAULT: theirs | {"dataset": str(root / "as-is"), "sampling": "random"},
        BEST: theirs | {"dataset": str(root / "sorted"), "sampling": "sequential", "precompute": True},
    }


def run(job: Record, threads: int) -> Record:
    """One run of one side; this engine's reference is scored by a process of its own, as its stage does."""
    if job["side"] == "trl":
        with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as copy:  # TRL caches the reference beside the data
            fresh = datasets.load_from_disk(job["dataset"])
            fresh.save_to_disk(copy)
            return in_fresh_process("offline_sides", job | {"dataset": copy}, threads=threads)
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as columns:
        scored = in_fresh_process(
            "offline_sides", job | {"side": "rayalign reference", "columns": columns}, threads=threads
        )
        return scored | in_fresh_process("offline_sides", job | {"columns": columns}, threads=threads)


def check_losses(jobs: dict[str, Record], root: Path, threads: int) -> None:
    """Ends the program unless both sides, given the same order, start at ln 2 and compute the same loss ever after."""
    ours = run(jobs[OURS], threads)["losses"]
    theirs = run(jobs[DEFAULT] | {"dataset": str(root / "ours"), "sampling": "sequential"}, threads)["losses"]
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    starts = [abs(losses[0] - math.log(2)) for losses in (ours, theirs)]
    print(
        f"same order: losses at the first step are ln 2 up to {max(starts):.1e}; over {len(ours)} steps "
        f"({ours[0]:.4f} → {ours[-1]:.4f}) both sides' differ by at most {max(differences):.1e}"
    )
    if max(starts) > 1e-4 or max(differences) > LOSS_TOLERANCE:
        raise SystemExit(f"the two sides do not train on the same thing:\n{ours}\n{theirs}")


def alternate(jobs: dict[str, Record], *, repeats: int, threads: int) -> dict[str, list[Record]]:
    """Runs of every side, taking turns, so that a busy moment of the machine meets all of them."""
    runs: dict[str, list[Record]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            runs[name].append(run(job, threads))
    return runs


def render(runs: dict[str, list[Record]], lengths: Sequence[GroupLengths], config: LlamaConfig, peak: float) -> str:
    header = ("", "train s", "pairs/s", "tokens/s", "padding", "cells/pair", "of peak", "memory MB", "reference s")
    rows = [[name, *cells(records, lengths, config, peak)] for name, records in runs.items()]
    parts = [table(header, rows)]
    for name in (DEFAULT, BEST):
        for label, seconds in (("training alone", training), ("with the reference", total)):
            ratios = [seconds(b) / seconds(a) for a, b in zip(runs[OURS], runs[name], strict=True)]
            parts.append(f"{OURS} : {name}, {label}: {spread(ratios)} ×")
    return "\n".join(parts)


def cells(records: Sequence[Record], lengths: Sequence[GroupLengths], config: LlamaConfig, peak: float) -> list[str]:
    seconds = [training(record) for record in records]
    tokens = sum(length.packed for length in lengths)
    share = 3 * forward_flops(lengths, config) / median(seconds) / peak
    return [
        spread(seconds),
        f"{len(lengths) / median(seconds):.1f}",
        f"{tokens / median(seconds):.0f}",
        f"{records[0]['padding']:.1%}",
        f"{records[0]['cells'] / len(lengths):.0f}",
        f"{share:.0%}",
        spread([record["peak_bytes"] / 1e6 for record in records], 0),
        spread([record["reference_seconds"] for record in records]),
    ]


def training(record: Record) -> float:
    """Seconds of the loop without the reference's forwards."""
    return record["seconds"] - record.get("reference_inside", 0.0)


def total(record: Record) -> float:
    """Seconds of the loop and of the reference, wherever it was computed."""
    return training(record) + record["reference_seconds"]


def forward_flops(lengths: Sequence[GroupLengths], config: LlamaConfig) -> float:
    """Floating-point operations that one forward requires: each prompt once, no padding, logits of responses.

    Two per weight and token; attention, two products over the tokens seen.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    per_token = 2 * layers * (4 * width * width + 3 * width * config.intermediate_size)
    seen = sum(sum(contexts(length)) for length in lengths)
    tokens = sum(length.packed for length in lengths)
    predicted = sum(sum(length.predicted) for length in lengths)
    return per_token * tokens + 4 * layers * width * seen + 2 * width * config.vocab_size * predicted


def contexts(length: GroupLengths) -> Iterator[int]:
    """How many tokens every token of a group sees, itself included, summed over each of its parts."""
    yield length.prompt * (length.prompt + 1) // 2
    for tokens in length.candidates:
        yield tokens * length.prompt + tokens * (tokens + 1) // 2


if __name__ == "__main__":
    main()
