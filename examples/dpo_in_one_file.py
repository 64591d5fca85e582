"""DPO from top to bottom in one file: no Ray, no YAML, no engine. What a run of the package does, as a plain loop.

    python examples/dpo_in_one_file.py
    python examples/dpo_in_one_file.py --data pairs.jsonl --model path/or/hub-id --lr 5e-7 --output my-model

The first line trains the support desk's small model of examples/lab, from random weights, on pairs written on the spot.
``--data`` takes any preference file that the package reads: TRL's columns, HH transcripts, UltraFeedback and so on.
The package's own runs give the same losses on the same pairs; a test compares them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lab.world import pairs as lab_pairs

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.pack import pack
from rayalign.data.records import RawRow, Row
from rayalign.data.stream import Stream
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks, why_unfit
from rayalign.engine.model.forward import Policy
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.methods import dpo_loss
from rayalign.types import PackedBatch

LAB_MODEL = Path(__file__).parent / "lab" / "model"
ROW_TOKENS = 512
"""Prompt groups are laid side by side in rows of about this many tokens; a prompt is there once for both answers."""


def main(args: argparse.Namespace) -> list[float]:
    """Train, save the model, and return the loss of every step."""
    spec = ModelSpec(config=ModelConfig(name=str(args.model), from_scratch=args.model == LAB_MODEL), seed=args.seed)
    model, tokenizer = load_policy(spec)
    policy = Policy(model)
    chat = make_chat(tokenizer)

    # Rows → token ids. A pair is a group of two candidates: the chosen answer, then the rejected one.
    settings = TokenBudget(max_prompt_tokens=args.max_tokens // 2, max_tokens=args.max_tokens)
    outcomes = rows_to_groups(read_rows(args), chat, settings)
    tokenized = [outcome for outcome in outcomes if isinstance(outcome, Tokenized)]
    groups = [outcome.group for outcome in tokenized if not why_unfit(outcome.example, "pair")]
    print(f"{len(groups)} pairs; {len(outcomes) - len(groups)} rows cannot be used")

    # The policy before the first step is the reference: its log-probs are computed once and carried with the data.
    groups = [group for part in chunks(groups, args.groups_per_micro_batch) for group in with_reference(policy, part)]

    # The order of the data is a function of the position: no state, nothing to resume.
    stream = Stream(
        name="train", sizes=(len(groups),), weights=(1.0,), groups_per_step=args.groups_per_step, seed=args.seed
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    losses = []
    for step in range(args.steps):
        positions = stream.positions(step)
        step_loss = step_margin = 0.0
        optimizer.zero_grad()
        for part in chunks(positions, args.groups_per_micro_batch):
            batch = pack_pairs([groups[stream.row(position)[1]] for position in part])
            scores = policy(batch)
            ref_logp = batch.per_candidate["ref_logp"]
            loss = dpo_loss(scores.logp, ref_logp, beta=args.beta).sum() / len(positions)
            loss.backward()
            logratio = (scores.logp - ref_logp).detach()
            step_loss += loss.item()
            step_margin += args.beta * (logratio[:, 0] - logratio[:, 1]).sum().item() / len(positions)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, args)
        optimizer.step()
        losses.append(step_loss)
        print(f"step {step + 1:4d}  loss {step_loss:.4f}  margin {step_margin:+.4f}  grad norm {grad_norm:.3f}")

    if args.output is not None:
        save_pretrained(model, tokenizer, args.output, stop_ids=(chat.end_id,))
        print(f"model: {args.output}")
    return losses


def read_rows(args: argparse.Namespace) -> list[Row]:
    if args.data is not None:
        return [row for chunk in read_chunks(Unit(path=str(args.data))) for row in chunk]
    written = lab_pairs(args.seed, 512)
    return [RawRow(source="lab", line=line, value=row) for line, row in enumerate(written, start=1)]


def pack_pairs(groups: Sequence[Group]) -> PackedBatch:
    return pack(groups, positions=range(len(groups)), num_candidates=2, pad_id=0, row_tokens=ROW_TOKENS)


@torch.no_grad()
def with_reference(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """The groups with the log-prob of every response token under the policy as it is now."""
    token_logp = policy(pack_pairs(groups)).token_logp
    lengths = [sum(candidate.num_predicted for candidate in group.candidates) for group in groups]
    columns = token_logp.split(lengths)
    return [
        replace(group, per_token={"ref_token_logp": column.numpy()})
        for group, column in zip(groups, columns, strict=True)
    ]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to nothing."""
    warmup = round(0.1 * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a preference file; by default pairs of examples/lab are written")
    parser.add_argument("--model", default=LAB_MODEL, help="a Hugging Face directory or Hub id")
    parser.add_argument("--output", type=Path, help="where the trained model goes")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--groups-per-step", type=int, default=16)
    parser.add_argument("--groups-per-micro-batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256, help="prompt and answer together")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
