"""What the schema already says but this release does not run. The only place that knows."""

from __future__ import annotations

from rayalign.config.run import RunConfig


def unsupported(run: RunConfig) -> list[str]:
    """One sentence per setting that cannot be run yet; empty for a run that can start."""
    measured = run.evaluate
    scorers = [] if measured is None else [*measured.scorers, *measured.diagnostics, measured.judge]
    found = {
        f"data_policy: {run.data_policy.name}; write off_policy": run.data_policy.name != "off_policy",
        "label.relabel: true; write false": run.label is not None and run.label.relabel,
        f"strategy: {run.strategy.name}; write single or ddp": run.strategy.name in ("fsdp2", "deepspeed"),
        "model.lora; remove it to train all weights": run.model.lora is not None,
        "llm scorers and judges; write rule or reward_model": any(s is not None and s.name == "llm" for s in scorers),
    }
    return [f"this release does not run {setting}" for setting, is_used in found.items() if is_used]
