"""Check and tokenize real pairs: this project's Ray Data stage and ``datasets.map``, side by side on two processes.

    python -m examples.bench.data_throughput [--quick]

The first two read the same lines, apply the same functions (format, roles, template, token ids with masks) and leave
the result on disk. The third is what TRL's DPOTrainer does with these rows before its first step, on two processes too;
it runs where TRL is installed. Seconds include everything from the file to the committed result; the start of Ray is
shown beside them.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import datasets

from rayalign.config.data import DataConfig, TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import Chat, make_chat
from rayalign.data.records import RawRow
from rayalign.data.store import commit_store
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.runtime.datasets import prepare
from rayalign.runtime.reading import planned
from rayalign.runtime.session import connect

from .common import arguments, machine, pairs_file, spread, table, train_tokenizer, write_model

BUDGET = {"max_prompt_tokens": 384, "max_tokens": 512}
VOCABULARY = 8192
PROCESSES = 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--copies", type=int, default=8, help="how often the file's rows are repeated")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, taking turns")
    options = parser.parse_args()
    if options.quick:
        options.copies, options.repeats = 1, 1
    datasets.disable_progress_bars()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder:
        root = Path(folder)
        source = pairs_file()
        lines = root / "pairs.jsonl"
        lines.write_bytes(gzip.decompress(source.read_bytes()) * options.copies)
        rows = lines.read_bytes().count(b"\n")
        write_model(root / "model", train_tokenizer(source, VOCABULARY), VOCABULARY)
        seconds: dict[str, list[float]] = {name: [] for name in ("rayalign, Ray Data", "the same, datasets.map", "TRL")}
        ours, theirs, peers = seconds.values()
        began = time.perf_counter()
        with connect():
            start = time.perf_counter() - began
            for turn in range(options.repeats):
                ours.append(staged(lines, root / "model", root / f"ours-{turn}", rows))
                theirs.append(mapped(lines, root / "model", root / f"theirs-{turn}", rows))
                if importlib.util.find_spec("trl") is not None:
                    peers.append(trl(lines, root / "model", root / f"trl-{turn}"))
    print(f"{rows} rows; Ray started in {start:.1f} s")
    print(table(("", "s", "rows/s"), [[n, spread(s), f"{rows / median(s):.0f}"] for n, s in seconds.items() if s]))
    for name, other in list(seconds.items())[1:]:
        if other:
            print(f"{name} : rayalign, seconds: {spread([b / a for a, b in zip(ours, other, strict=True)], 2)} ×")


def staged(lines: Path, tokenizer: Path, directory: Path, rows: int) -> float:
    """Seconds of the stage that ``rayalign train`` runs."""
    model, data = ModelConfig(name=str(tokenizer)), DataConfig(train=(str(lines),), **BUDGET)
    began = time.perf_counter()
    directory.mkdir()
    found = prepare(
        planned([Unit(path=str(lines))], directory),
        model,
        data,
        completed="no",
        shape="pair",
        directory=directory,
        writers=PROCESSES,
        note=lambda line: None,
    )
    commit_store(directory, [shard for report in found.reports for shard in report.shards], meta={})
    seconds = time.perf_counter() - began
    assert found.rows == rows, (found.rows, rows)
    return seconds


def mapped(lines: Path, tokenizer: Path, directory: Path, rows: int) -> float:
    """Seconds of the same functions under ``datasets.map``, its own cache turned off."""
    chat = make_chat(load_tokenizer(tokenizer))
    began = time.perf_counter()
    loaded = datasets.load_dataset(
        "json", data_files=str(lines), split="train", cache_dir=str(directory / "cache"), keep_in_memory=False
    )
    done = loaded.map(
        tokenized,
        batched=True,
        batch_size=512,
        num_proc=PROCESSES,
        fn_kwargs={"chat": chat},
        remove_columns=loaded.column_names,
        load_from_cache_file=False,
    )
    done.save_to_disk(directory / "done")
    seconds = time.perf_counter() - began
    assert done.num_rows == rows, (done.num_rows, rows)
    return seconds


def trl(lines: Path, tokenizer: Path, directory: Path) -> float:
    """Seconds of TRL's own preparation of preference pairs; its rows lack masks, reports and bad rows."""
    from trl import DPOConfig, DPOTrainer

    loaded = load_tokenizer(tokenizer)
    config = DPOConfig(output_dir=str(directory), dataset_num_proc=PROCESSES, use_cpu=True, bf16=False)
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(directory / "cache"))
    DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=loaded), rows, loaded, config, "train")
    return time.perf_counter() - began


def tokenized(batch: dict[str, list[Any]], *, chat: Chat) -> dict[str, list[Any]]:
    """A batch of rows through the same functions, as columns; a bad row is a row with its reason."""
    values = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    raw = [RawRow(source="pairs.jsonl", line=number, value=value) for number, value in enumerate(values, start=1)]
    columns: dict[str, list[Any]] = {"prompt_ids": [], "candidate_ids": [], "trained": [], "bad": []}
    for outcome in rows_to_groups(raw, chat, TokenBudget(**BUDGET)):
        good = outcome.group if isinstance(outcome, Tokenized) else None
        candidates = good.candidates if good else ()
        columns["prompt_ids"].append(good.prompt_ids.tolist() if good else [])
        columns["candidate_ids"].append([candidate.ids.tolist() for candidate in candidates])
        columns["trained"].append([candidate.mask.tolist() for candidate in candidates])
        columns["bad"].append("" if good else json.dumps(str(outcome)))
    return columns


if __name__ == "__main__":
    main()
