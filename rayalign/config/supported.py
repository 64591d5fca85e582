"""What the schema already says but this release does not run. The only place that knows."""

from __future__ import annotations

from collections.abc import Iterator

from rayalign.config.run import RunConfig
from rayalign.config.scoring import EvaluateConfig


def unsupported(run: RunConfig) -> list[str]:
    """One sentence per setting that cannot be run yet; empty for a run that can start."""
    record = run.method.record
    found = {
        "elastic workers with strategy: deepspeed, whose checkpoints need as many workers; write one number": (
            isinstance(run.strategy.workers, tuple) and run.strategy.name == "deepspeed"
        ),
        "storage_path: an object store with strategy: deepspeed, which needs a shared folder; write fsdp2 or ddp": (
            "://" in run.storage_path and run.strategy.name == "deepspeed"
        ),
        "model.compile with strategy: deepspeed; write single, ddp or fsdp2": (
            run.model.compile and run.strategy.name == "deepspeed"
        ),
        "optim.on_nonfinite: skip with strategy: deepspeed, which may have updated already; write stop, or fsdp2": (
            run.optim.on_nonfinite == "skip" and run.strategy.name == "deepspeed"
        ),
        f"method: {record.name}, which needs a scalar head beside the policy's log-probabilities": (
            record.trains == "policy" and bool(record.needs & {"value", "score"})
        ),
    }
    settings = [setting for setting, is_used in found.items() if is_used]
    return [f"this release does not run {setting}" for setting in (*settings, *_evaluation(run.evaluate))]


def _evaluation(evaluate: EvaluateConfig | None) -> Iterator[str]:
    if evaluate is None:
        return
    if evaluate.sampling.temperature != 1 or evaluate.sampling.top_p != 1:
        yield "evaluate.sampling other than temperature 1 and top_p 1, at which the KL is measured; remove them"
