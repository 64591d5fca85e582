"""What the benchmarks share: real pairs, a tokenizer trained on them, a model without training, and tables."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayalign.engine.model.pretrained import save_pretrained

REPOSITORY = Path(__file__).parents[2]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows what every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute at most: enough to see that it runs")
    parser.add_argument("--threads", type=int, default=2, help="threads of every measured process")
    return parser


def pairs_file() -> Path:
    """``hh_harmless_test.jsonl.gz`` below ``RAYALIGN_TEST_DATA``; ends the program with the reason without it."""
    folder = Path(os.environ.get("RAYALIGN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    file = folder / "hh_harmless_test.jsonl.gz"
    if not file.is_file():
        sys.exit(
            f"no {file.name} in {folder}: set RAYALIGN_TEST_DATA to a folder that holds it "
            "(harmless-base/test.jsonl.gz of Anthropic's hh-rlhf, under that name)"
        )
    return file


def train_tokenizer(file: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML, trained on the texts of ``file``."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        tokenizer.train_from_iterator((text for line in lines for text in json.loads(line).values()), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHATML
    return wrapped


def write_model(directory: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> LlamaConfig:
    """A Llama of 4 layers, hidden 256, MLP 704, 4 heads of 64 and untied embeddings, with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    save_pretrained(LlamaForCausalLM(config), tokenizer, directory)
    return config


def in_fresh_process(module: str, job: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    """What ``python -m examples.bench.<module>`` answers to ``job``, both as JSON; its output shows if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder:
        question, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(dict(job)))
        done = subprocess.run(
            [sys.executable, "-m", f"examples.bench.{module}", str(question), str(answer)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{job} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(answer.read_text())


def matmul_peak(threads: int) -> float:
    """FLOP/s of the best of some large float32 matrix products in this process."""
    import time

    torch.set_num_threads(threads)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def machine() -> str:
    """One line that says where a table was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{model}, {os.cpu_count()} cores, load {load}; python {platform.python_version()}, torch {torch.__version__}"
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range, as ``12.3 (11.9–13.0)``."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )
