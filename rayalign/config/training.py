"""The blocks about steps and workers: ``optim``, ``strategy``, ``checkpoint``, ``reference``, ``weighting``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayalign.config.fields import BY_CONTENT, MAY_CHANGE, Block, Elastic, InputPath, ModelPath
from rayalign.methods.weighting import WPOWeighting


def _some_norm(value: object) -> object:
    if value == 0:
        raise ValueError("0 would scale every gradient to nothing; write null to clip none")
    return value


class OptimConfig(Block):
    """AdamW in float32 and the size of a step."""

    lr: float = Field(default=1.0e-6, gt=0)
    """The largest learning rate, after the warm-up."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the whole run."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data, instead of ``steps``; 1 where neither is given."""
    groups_per_step: int = Field(default=64, ge=1)
    """Prompt groups (pairs, for a pairwise method) of one optimizer step, over all workers."""
    tokens_per_micro_batch: Annotated[int, MAY_CHANGE] = Field(default=8192, ge=1)
    """Bounds the memory of one forward; changes results only by rounding."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(default=0.1, ge=0)
    """A fraction of the steps (below 1) or a number of steps (1 and above)."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, as a fraction of ``lr``."""
    max_grad_norm: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_some_norm)] = 1.0
    """A gradient with a larger Euclidean norm is scaled down to it; null: none is."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay of the first and of the second moment."""
    eps: float = Field(default=1.0e-8, gt=0)
    """AdamW's, beside the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, times the learning rate."""
    on_nonfinite: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """A NaN or infinite loss or gradient: stop ends the run and saves the step's groups; skip leaves the step out."""
    max_skipped_in_a_row: Annotated[int, MAY_CHANGE] = Field(default=3, ge=1)
    """skip: more such steps one after the other end the run, as stop does."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_by_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("steps") is None and data.get("epochs") is None:
            return {**data, "epochs": 1.0}
        return data

    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.warmup > 1 and not self.warmup.is_integer():
            raise ValueError(f"warmup {self.warmup:g} is neither a fraction below 1 nor a whole number of steps")
        if self.schedule == "constant" and self.min_lr_ratio > 0:
            raise ValueError("a constant schedule ends at lr: remove min_lr_ratio, or write cosine or linear")
        most = type(self).model_fields["max_skipped_in_a_row"].default
        if self.on_nonfinite == "stop" and self.max_skipped_in_a_row != most:
            raise ValueError("stop skips no step: remove max_skipped_in_a_row, or write on_nonfinite: skip")
        if self.steps is not None:
            self.refuse_long_warmup(self.steps)
        return self

    def refuse_long_warmup(self, steps: int) -> None:
        """Raise ValueError where a run of ``steps`` would end before its warm-up."""
        if self.warmup_steps(steps) > steps:
            raise ValueError(f"warmup of {self.warmup:g} steps is longer than the run of {steps}")

    def warmup_steps(self, steps: int) -> int:
        """The number of warm-up steps of a run of ``steps``; a fraction is rounded to the nearest step."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


StrategyName = Literal["single", "ddp", "fsdp2", "deepspeed"]
OPTIONS = {
    "zero_stage": ("deepspeed",),
    "config": ("deepspeed",),
    "cpu_offload": ("fsdp2", "deepspeed"),
    "reshard_after_forward": ("fsdp2",),
    "sync_every_micro_batch": ("fsdp2",),
    "shard": ("fsdp2",),
}
"""Options of ``strategy`` that only some strategies have."""


class StrategyConfig(Block):
    """How the policy is spread over workers."""

    name: StrategyName = "single"
    """single: one process; ddp: whole copies; fsdp2: shards; deepspeed: ZeRO."""
    workers: Elastic = "auto"
    """A number, [smallest, largest] (elastic), or auto: one per GPU, on CPUs one."""
    cpu_offload: bool = False
    """fsdp2, deepspeed: parameters and optimizer state wait in the host's memory; slower."""
    reshard_after_forward: bool = True
    """fsdp2: free a block's parameters after its forward; false gathers them once instead of twice."""
    sync_every_micro_batch: bool = True
    """fsdp2: average gradients after every micro-batch, so that they stay sharded. With false they are averaged once
    per step, and every worker holds all of them until then."""
    shard: int | None = Field(default=None, ge=1)
    """fsdp2: workers that share one copy of the model, such as the GPUs of a node; null: all of them."""
    timeout_seconds: float = Field(default=600, ge=1)
    """A worker that is silent for this long is given up, and another attempt resumes from the newest checkpoint. It
    must exceed what one worker needs alone: to load the model, to write a checkpoint."""
    zero_stage: Literal[2, 3] | None = None
    """deepspeed: 2 shards gradients and optimizer state, 3 parameters too; null: what config says, else 2."""
    config: InputPath | None = None
    """deepspeed: a JSON file of its settings; where it contradicts this file, every conflict is named."""

    @property
    def fewest(self) -> int | None:
        """The smaller of two numbers of workers; None where the run is not elastic."""
        return self.workers[0] if isinstance(self.workers, tuple) else None

    @property
    def most(self) -> int | None:
        """The number of workers, the larger of two; None: one per device."""
        if self.name == "single":
            return 1
        if self.workers == "auto":
            return None
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def _enough_workers(self) -> Self:
        smallest = self.workers[0] if isinstance(self.workers, tuple) else self.workers
        if smallest != "auto" and smallest < 1:
            raise ValueError("workers must be at least 1")
        if self.name == "single" and self.workers not in ("auto", 1):
            raise ValueError(f"single trains in one process; for workers: {self.workers} write name: ddp or fsdp2")
        return self

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.shard is None or self.workers == "auto":
            return self
        if isinstance(self.workers, tuple):
            raise ValueError("shard needs a fixed number of workers: remove it, or write one number of workers")
        if self.workers % self.shard:
            raise ValueError(f"{self.workers} workers are no whole number of copies of shard: {self.shard}")
        return self

    @model_validator(mode="after")
    def _options_of_this_strategy(self) -> Self:
        for option, strategies in OPTIONS.items():
            if self.name not in strategies and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} is an option of {' and '.join(strategies)}; remove it, or change name")
        return self


class BestConfig(Block):
    """What tells the best checkpoint: a number in its step's row of metrics."""

    metric: str = Field(min_length=1)
    """A key of metrics.jsonl, such as eval_loss, loss, rewards/margins or rollout/reward."""
    mode: Literal["min", "max"]
    """min: the smallest is the best."""


class CheckpointConfig(Block):
    """What a restart finds."""

    every: int = Field(default=100, ge=1)
    """Steps."""
    keep: int = Field(default=2, ge=1)
    """The newest that are kept; the final model is always kept."""
    asynchronous: bool = False
    """true: training waits only until its state is copied into the host's memory; a thread writes the files."""
    restart_optimizer: bool = False
    """true: resume from the weights with a new optimizer where its state cannot be read. That is so between deepspeed
    and other strategies, and for another number of deepspeed's workers. false refuses."""
    best: BestConfig | None = None
    """{metric: eval_loss, mode: min}: the best one is kept beside the newest, and checkpoints/best.json names it."""


ParameterDtype = Literal["auto", "bfloat16", "float32"]


class ReferenceConfig(Block):
    """Where the reference policy's log-probabilities are computed, and what its parameters are held in."""

    place: Annotated[Literal["pool", "trainer"], MAY_CHANGE] = "pool"
    """pool: ahead of training, in actors that each hold the whole model. trainer: in the training processes, at every
    step. With LoRA that is the policy without its adapter, else a second, frozen model, which fsdp2 and deepspeed
    shard."""
    dtype: ParameterDtype = "auto"
    """Precision of the frozen parameters, in evaluations too. auto: bfloat16 where the computation is in bfloat16 and
    no result changes. Then embeddings of float32 files and fused experts stay float32. bfloat16: these too."""


class CriticConfig(Block):
    """The second model of a method with a critic (ppo): it says, before every token, what the completion will earn."""

    model: Annotated[ModelPath | None, BY_CONTENT] = None
    """A reward model or a language model with the policy's tokenizer; null: the policy before the first step."""
    lr: float = Field(default=9.0e-6, gt=0)
    """Learning rate of the critic's optimizer, which is optim's in all else (OpenRLHF: nine times the policy's)."""


class WeightingConfig(WPOWeighting):
    """A weight on top of the method. 2406.11827, Eq. 1 and 2."""

    name: Literal["wpo"] = "wpo"
