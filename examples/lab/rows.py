"""The support desk's data, as rows with TRL's columns in conversational form.

Prompts are one user message and replies one assistant message, so the chat template of ``model/`` turns them into
``<bos> prompt <reply> reply <eos>``, one token per word. Every function is a stream: the same seed gives the same rows,
a longer stream begins with the shorter one, and no two functions (nor two splits of prompts) share their draws.

    python -m examples.lab.rows FOLDER --seed 0        # writes the files named in FILES
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from .world import FamilyName, prefers_first, write_prompt, write_reply

Row = dict[str, list[dict[str, str]]]

FAR_SHARE = 0.7


def sft_rows(seed: int, n: int) -> list[Row]:
    """What the desk has written so far, shop and travel in turn: ``prompt`` and ``completion``."""
    return list(islice(_written_by_desk(Random(f"sft {seed}")), n))


def reference_rows(seed: int, n: int) -> list[Row]:
    """Fresh letters of the same desk on both families, for a loss term that holds the model near its reference."""
    return list(islice(_written_by_desk(Random(f"reference {seed}")), n))


def prompts(seed: int, n: int, family: FamilyName, *, split: Literal["train", "eval"] = "train") -> list[Row]:
    """Customers of one family: ``prompt`` only."""
    rng = Random(f"prompts {split} {family} {seed}")
    return [{"prompt": _user(write_prompt(rng, family))} for _ in range(n)]


def pairs(seed: int, n: int, *, far_share: float = FAR_SHARE) -> list[Row]:
    """Shop prompts with two replies by one writer, labelled by the noisy labeller: ``prompt, chosen, rejected``.

    ``far_share`` of the pairs come from the slangy desk, the others from the near one.
    """
    rng = Random(f"pairs {seed}")
    return [_pair(rng, far=rng.random() < far_share) for _ in range(n)]


def _pair(rng: Random, *, far: bool) -> Row:
    prompt = write_prompt(rng, "shop")
    first, second = (write_reply(rng, prompt, "far" if far else "near") for _ in range(2))
    chosen, rejected = (first, second) if prefers_first(rng, prompt, first, second) else (second, first)
    return {"prompt": _user(prompt), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}


def _written_by_desk(rng: Random) -> Iterator[Row]:
    while True:
        for family in ("shop", "travel"):
            prompt = write_prompt(rng, family)
            yield {"prompt": _user(prompt), "completion": _assistant(write_reply(rng, prompt, "desk"))}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FILES: Mapping[str, Callable[[int], list[Row]]] = {
    "sft.jsonl": partial(sft_rows, n=5000),
    "reference.jsonl": partial(reference_rows, n=800),
    "pairs.jsonl": partial(pairs, n=1200),
    "prompts.jsonl": partial(prompts, n=1600, family="shop"),
    "eval_shop.jsonl": partial(prompts, n=128, family="shop", split="eval"),
    "eval_travel.jsonl": partial(prompts, n=128, family="travel", split="eval"),
}
"""File name → rows for a seed. 1 600 prompts last for 100 steps that draw 64 fresh ones every 4 steps."""


def write_files(folder: Path, seed: int) -> None:
    """Write every file of :data:`FILES` as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in make(seed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the support desk's data as JSON lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_files(options.folder, options.seed)


if __name__ == "__main__":
    main()
