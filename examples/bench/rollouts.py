"""What sampling costs: the pool against its bare engine, and the embedded engine against ``model.generate``.

    python -m examples.bench.rollouts [--engine hf|vllm] [--quick]

All sides take turns in one run, on the same prompts. Every completion has the same length. vLLM is measured without
``generate``, in an environment that has it (``make test-vllm`` makes one).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rayalign.config.candidates import Labelling
from rayalign.config.model import ModelConfig
from rayalign.config.policy import LabelConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.data.shard import write_shard
from rayalign.data.store import commit_store
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.placement import Share
from rayalign.remarks import Remarks
from rayalign.rollout.base import SamplingParams
from rayalign.rollout.engines import make_sampler
from rayalign.rounds.chunk import ChunkMaker, ChunkSpec
from rayalign.rounds.drawing import draw_chunks
from rayalign.rounds.stored import StoredGroups
from rayalign.rounds.streams import StoredStream
from rayalign.runtime.pool import Pool
from rayalign.runtime.session import CPU_ROW_TOKENS, connect

from .common import arguments, machine, pairs_file, spread, table, train_tokenizer, write_model
from .offline_step import TOKENIZER_VOCABULARY, tokenized_pairs

NEW_TOKENS = 64
ROWS_PER_BATCH = 64
"""Batch size of ``generate``: it is fast with it, whatever the number of samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The prompts and how often each is completed."""

    spec: ChunkSpec
    prompts: int

    @property
    def sampling(self) -> SamplingParams:
        assert self.spec.sampling is not None
        return self.spec.sampling

    @property
    def tokens(self) -> int:
        return self.prompts * self.sampling.num_samples * NEW_TOKENS


class Bare:
    """One process with the engine, or the model itself, and nothing of ours around it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        drawn = StoredGroups(job.spec.prompts, job.spec.seed).at(range(job.prompts))
        self.prompts = [group.read().prompt_ids.tolist() for group in drawn]
        self.sampler = make_sampler(job.spec.engine, job.spec.reference, torch.device("cpu"))
        self.sampler.load(job.spec.policy)
        self.model = AutoModelForCausalLM.from_pretrained(job.spec.policy.name, dtype=torch.float32).eval()

    def __call__(self, samples: tuple[str, int]) -> int:
        """Tokens drawn by ``engine`` or ``generate`` with so many samples of each prompt."""
        side, count = samples
        params = replace(self.job.sampling, num_samples=count)
        if side == "engine":
            return sum(len(found.token_ids) for found in self.sampler.generate(self.prompts, params))
        return sum(self._generate(batch, count) for batch in batches(self.prompts, max(1, ROWS_PER_BATCH // count)))

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], count: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=count,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            output_logits=False,
        )
        return int(found[:, longest:].numel())


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[Sequence[Sequence[int]]]:
    """Batches of similar length, as one would make them by hand."""
    ordered = sorted(prompts, key=len)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def write_job(root: Path, *, engine: str, prompts: int) -> Job:
    file = pairs_file()
    tokenizer = train_tokenizer(file, TOKENIZER_VOCABULARY)
    pairs = tokenized_pairs(file, tokenizer, prompts)
    asked = [replace(group, candidates=(), per_candidate={}, per_token={}) for group in pairs]
    texts = [tokenizer.decode(group.prompt_ids) for group in asked]
    shard = write_shard(root / "prompts", "0", asked, prompts=texts)
    commit_store(root / "prompts", [shard], meta={})
    write_model(root / "model", tokenizer, TOKENIZER_VOCABULARY)
    policy = ModelSpec(config=ModelConfig(name=str(root / "model"), dtype="float32"))
    stream = StoredStream(
        name="prompts",
        stores=(root / "prompts",),
        columns=((),),
        weights=(1.0,),
        groups_per_step=prompts,
        num_candidates=1,
    )
    spec = ChunkSpec(
        prompts=stream,
        seed=0,
        policy=policy,
        reference=ScoringSpec(model=policy, tokens_per_micro_batch=8192, row_tokens=CPU_ROW_TOKENS),
        engine=engine,
        sampling=SamplingParams(max_new_tokens=NEW_TOKENS, num_samples=8),
        keep_stored=False,
        labelling=Labelling(
            scorer=RuleScorerConfig(function="rayalign.judge.rule:no_score"), label=LabelConfig(name="rewards")
        ),
        shape="group",
        needs_reference=False,
    )
    return Job(spec=spec, prompts=prompts)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument(
        "--repeats", type=int, default=7, help="turns of each side; one more before them does not count"
    )
    parser.add_argument("--pool-only", action="store_true", help="leave out `generate` and single samples")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.repeats = 8, 1
    print(machine())
    share = Share(cpus=0.5, gpus=0, threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder, connect():
        job = write_job(Path(folder), engine=options.engine, prompts=options.prompts)
        with (
            Pool("bare", Bare, job, share=share, most=1) as bare,
            Pool("pool", ChunkMaker, share=share, most=1) as pool,
        ):
            sides = {"pool, n = 8": lambda turn: drawn(job, pool, Path(folder) / f"round{turn}")}
            sides["bare engine, n = 8"] = lambda turn: bare.call(("engine", 8))
            if options.engine == "hf" and not options.pool_only:
                sides["model.generate, n = 8"] = lambda turn: bare.call(("generate", 8))
                sides["bare engine, n = 1"] = lambda turn: bare.call(("engine", 1))
                sides["model.generate, n = 1"] = lambda turn: bare.call(("generate", 1))
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(options.repeats + 1):
                for side, work in sides.items():
                    began = time.perf_counter()
                    tokens = work(turn)
                    if turn:
                        speeds[side].append(tokens / (time.perf_counter() - began))
    print(f"{options.engine}: {options.prompts} prompts, {NEW_TOKENS} new tokens each, {options.repeats} turns")
    print(table(("", "tokens/s"), [[side, spread(found, 0)] for side, found in speeds.items()]))
    for left, right in (
        ("pool, n = 8", "bare engine, n = 8"),
        ("bare engine, n = 8", "model.generate, n = 8"),
        ("bare engine, n = 1", "model.generate, n = 1"),
    ):
        if right in speeds:
            ratios = [mine / theirs for mine, theirs in zip(speeds[left], speeds[right], strict=True)]
            print(f"{left} : {right}, turn by turn: {spread(ratios, 2)} ×")


def drawn(job: Job, pool: Pool, directory: Path) -> int:
    """One round through the pool: completed, scored, labelled, written."""
    reports = draw_chunks(
        job.spec,
        range(job.prompts),
        directory,
        weights=None,
        pool=pool,
        max_bad_fraction=0.0,
        told=Remarks(),
        done=lambda text: None,
    )
    return sum(report["tokens_generated"] for report in reports)


if __name__ == "__main__":
    main()
