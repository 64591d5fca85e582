"""One step of GRPO (generate, score, reference, train; K = 8) beside TRL's GRPOTrainer, and what shared prompts save.

    python -m examples.bench.grpo_step [--quick]

Both sides: one process, the same random model, prompts, completion length, reward and KL term. Ours also trains with
every completion carrying a prompt of its own (``concatenated``), which tells what sharing it saves in the update.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from examples.lab.in_process import Alone
from rayalign.config.candidates import Drawing, Labelling
from rayalign.config.model import ModelConfig
from rayalign.config.policy import LabelConfig, OnPolicyConfig, RolloutConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.config.training import CheckpointConfig, OptimConfig
from rayalign.data.rows import Layout
from rayalign.engine import loop
from rayalign.engine.frozen import ScoringSpec
from rayalign.engine.model.attention import CONCATENATED_ONLY
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.objective import MAIN_STREAM, Objective
from rayalign.engine.state import TrainSpec
from rayalign.engine.strategy.base import make_strategy
from rayalign.methods import resolve
from rayalign.placement import Share
from rayalign.rollout.base import SamplingParams
from rayalign.rounds.chunk import ChunkSpec
from rayalign.rounds.client import RoundsClient
from rayalign.rounds.columns import RoundPreparation
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.service import RolloutJob, serve_rounds
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import RoundStream, SourceSpec
from rayalign.runtime.session import CPU_ROW_TOKENS

from .common import arguments, in_fresh_process, machine, spread, table
from .offline_step import TOKENS_PER_MICRO_BATCH
from .rollouts import write_job

SAMPLES, NEW_TOKENS, GROUPS, KL = 8, 48, 8, 0.04
WARM_UP = 1
SIDES = ("rayalign, packed", "rayalign, concatenated", "TRL")
Record = dict[str, Any]


def reward(reply: str) -> float:
    return float(len(reply) % 97)


def main() -> None:
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_file():
        return measured(Path(sys.argv[1]), Path(sys.argv[2]))
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=6, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, taking turns")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = WARM_UP + 1, 1
    print(machine())
    runs: dict[str, list[Record]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            job = {"side": side, "steps": options.steps}
            runs[side].append(in_fresh_process("grpo_step", job, threads=options.threads))
    print(f"{GROUPS} prompts a step, {SAMPLES} samples of {NEW_TOKENS} tokens, {options.steps} steps a run; medians")
    rows = [
        [side, spread([run["step"] for run in found], 2), spread([run["update"] for run in found], 2), tokens_of(found)]
        for side, found in runs.items()
    ]
    print(table(("", "s a step", "s of it in the update", "tokens in the update"), rows))
    ours = runs[SIDES[0]]
    ratio = [theirs["step"] / mine["step"] for theirs, mine in zip(runs["TRL"], ours, strict=True)]
    saved = [theirs["update"] / mine["update"] for theirs, mine in zip(runs[SIDES[1]], ours, strict=True)]
    print(f"TRL : {SIDES[0]}, a step, turn by turn: {spread(ratio, 2)} ×")
    print(f"{SIDES[1]} : {SIDES[0]}, the update, turn by turn: {spread(saved, 2)} ×")


def tokens_of(found: list[Record]) -> str:
    return spread([run["tokens"] for run in found], 0)


def measured(question: Path, answer: Path) -> None:
    """One run of one side in this process."""
    job: Record = json.loads(question.read_text())
    with tempfile.TemporaryDirectory(prefix="rayalign-bench-") as folder:
        spec = write_job(Path(folder), engine="hf", prompts=GROUPS * job["steps"]).spec
        if job["side"] == "TRL":
            found = trl(Path(folder), spec, job["steps"])
        else:
            found = rayalign(Path(folder), spec, job["steps"], layout=job["side"].rpartition(" ")[2])
    answer.write_text(json.dumps(found))


def rayalign(folder: Path, drawn: ChunkSpec, steps: int, *, layout: Layout) -> Record:
    """The engine's own loop on rounds of one step, drawn by this process."""
    if layout == "concatenated":
        loop.choose_attention = lambda model, *, device: CONCATENATED_ONLY
    (folder / "scores.py").write_text("def score(prompt, reply):\n    return float(len(reply) % 97)\n")
    policy = ModelSpec(config=ModelConfig(name=str(folder / "model"), dtype="float32"))
    method = resolve("grpo")
    config = method.config(kl_coef=KL, normalize="grpo")  # type: ignore[call-arg]
    prepared = RoundPreparation(method=method, config=config, key="prepared")
    plan = RoundPlan(steps=steps, refresh_every=1, lag=0, groups_per_step=GROUPS)
    stream = RoundStream(
        name=MAIN_STREAM,
        prompts=drawn.prompts,
        plan=plan,
        folder=folder / "rounds",
        num_candidates=SAMPLES,
        prepared=prepared.key,
    )
    source = SourceSpec(
        streams=(stream,), seed=0, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, row_tokens=CPU_ROW_TOKENS
    )
    chunks = ChunkSpec(
        prompts=drawn.prompts,
        seed=0,
        policy=policy,
        reference=ScoringSpec(model=policy, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, row_tokens=CPU_ROW_TOKENS),
        engine="hf",
        sampling=SamplingParams(max_new_tokens=NEW_TOKENS, num_samples=SAMPLES),
        keep_stored=False,
        labelling=Labelling(
            scorer=RuleScorerConfig(function=f"{folder / 'scores.py'}:score"), label=LabelConfig(name="rewards")
        ),
        shape="group",
        needs_reference=True,
    )
    rollouts = RolloutJob(
        spec=chunks,
        plan=plan,
        folder=stream.folder,
        most=1,
        least=1,
        share=Share(cpus=1, gpus=0, threads=torch.get_num_threads()),
        drawing=Drawing(policy=OnPolicyConfig(), rollout=RolloutConfig(engine="hf"), labelling=chunks.labelling),
        max_bad_fraction=0.0,
        preparation=prepared,
    )
    spec = TrainSpec(
        directory=folder / "run",
        model=policy,
        objectives=(Objective(stream=MAIN_STREAM, method=method, config=config),),
        optim=OptimConfig(lr=1e-5, schedule="constant", warmup=0),
        steps=steps,
        seed=0,
        identity={},
        checkpoint=CheckpointConfig(every=10_000, keep=1),
    )
    rows: list[Record] = []

    rounds = RoundsClient(source)

    def make_batches(chosen: Layout, pad_id: int) -> StreamSource:
        return StreamSource(source, layout=chosen, pad_id=pad_id, rounds=rounds)

    with serve_rounds(rollouts, Alone(), lambda line: None):
        loop.train_policy(
            spec,
            make_batches,
            make_strategy("single", torch.device("cpu")),
            rounds=rounds,
            on_step=lambda row: rows.append({**row, "ended": time.perf_counter()}),
        )
    counted = rows[WARM_UP:]
    # From the end of a step to that of the next: sending the weights is no part of a row's own seconds.
    steps_took = [row["ended"] - before["ended"] for before, row in itertools.pairwise(rows)]
    return {
        "step": median(steps_took[WARM_UP - 1 :]),
        "update": median(row["seconds"] - row["seconds_waiting_for_data"] for row in counted),
        "tokens": median(row["step_tokens"] if layout == "packed" else concatenated(row) for row in counted),
    }


def concatenated(row: Record) -> float:
    """Tokens where every completion carries its prompt: ``step_tokens`` counts a prompt once per group."""
    prompts = row["step_tokens"] - row["rollout/tokens"]
    return float(row["rollout/tokens"] + SAMPLES * prompts)


def trl(folder: Path, drawn: ChunkSpec, steps: int) -> Record:
    """TRL's GRPOTrainer on the same prompts, as texts; nothing is logged or saved."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rayalign.rounds.stored import StoredGroups

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    groups = StoredGroups(drawn.prompts, 0).at(range(GROUPS * steps))
    texts = [tokenizer.decode(group.read().prompt_ids) for group in groups]
    seen: dict[str, list[float]] = {"step": [], "generate": [], "tokens": []}

    class Watched(GRPOTrainer):
        """Says how long it takes to make what it then trains on."""

        def _generate_and_score_completions(self, *positional: Any, **named: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate_and_score_completions(*positional, **named)
            seen["generate"].append(time.perf_counter() - began)
            seen["tokens"].append(float(made["prompt_mask"].sum() + made["completion_mask"].sum()))
            return made

    class Watch(TrainerCallback):
        def on_step_begin(self, *ignored: Any, **named: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *ignored: Any, **named: Any) -> None:
            seen["step"].append(time.perf_counter() - self.began)

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=GROUPS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        max_steps=steps,
        beta=KL,
        loss_type="grpo",
        temperature=1.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=lambda completions, **named: [reward(text) for text in completions],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()
    # A step begins after its batch was fetched, and generation happens inside it.
    return {
        "step": median(seen["step"][WARM_UP:]),
        "update": median(
            step - made for step, made in zip(seen["step"][WARM_UP:], seen["generate"][WARM_UP:], strict=True)
        ),
        "tokens": median(seen["tokens"][WARM_UP:]),
    }


if __name__ == "__main__":
    main()
