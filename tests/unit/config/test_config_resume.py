"""Which settings decide the model that a run ends in: every key of the schema is classified here, by hand."""

from __future__ import annotations

import pytest
from settings import leaves

from rayalign.config import load_run
from rayalign.config.fields import BY_CONTENT, MAY_CHANGE, OnResume
from rayalign.config.resume import identity
from rayalign.config.run import RunConfig

SOURCES = ("data.train", "auxiliary.data", "data_policy[on_policy].prompts", "data_policy[hybrid].prompts")
ROUNDS = ("data_policy[on_policy]", "data_policy[hybrid]")

TABLE: dict[OnResume | None, list[str]] = {
    # With another value the run ends in another model.
    None: [
        *("config_version", "seed", "method", "filter.policy_logp_quantile", "critic.lr", "data.stop"),
        *("model.dtype", "model.from_scratch", "model.save_dtype", "model.text_only", "reference.dtype"),
        *(f"model.lora.{key}" for key in ("rank", "alpha", "dropout", "target_modules")),
        *(f"{source}.weight" for source in SOURCES),
        *(f"weighting.{key}" for key in ("name", "alignment", "clamp", "which", "permute")),
        *(f"auxiliary.{key}" for key in ("name", "term", "weight", "reduction", "groups_per_step")),
        *("data_policy[off_policy].name", "data_policy[on_policy].passes", "data.shard_mb", "data.shuffle_shards"),
        *(f"{policy}.{key}" for policy in ROUNDS for key in ("name", "refresh_every", "lag")),
        *("data_policy[hybrid].mix", "data_policy[hybrid].on_fraction"),
        *(f"rollout.{key}" for key in ("engine", "samples", "temperature", "top_p", "max_new_tokens")),
        *(f"label.{key}" for key in ("name", "scale", "threshold", "gap", "rejected", "relabel")),
        *("scorer[rule].name", "scorer[rule].arguments", "scorer[reward_model].name"),
        *(f"scorer[llm].{key}" for key in ("name", "engine", "model", "max_new_tokens", "template")),
        *(f"optim.{key}" for key in ("lr", "steps", "epochs", "groups_per_step", "schedule", "warmup", "betas")),
        *(f"optim.{key}" for key in ("min_lr_ratio", "max_grad_norm", "eps", "weight_decay")),
    ],
    # Where something lies, or how it is read: the digest of what is read decides.
    BY_CONTENT: [
        *(f"{source}.{key}" for source in SOURCES for key in ("path", "function", "arguments", "split", "revision")),
        *(f"{source}.{key}" for source in SOURCES for key in ("columns", "format", "version", "config", "data_dir")),
        *(f"{source}.{key}" for source in SOURCES for key in ("data_files", "max_samples", "system")),
        *(f"{source}.chat_template_kwargs" for source in SOURCES),
        *(f"data.{key}" for key in ("format", "template", "max_prompt_tokens", "max_tokens", "truncated")),
        *(f"data.{key}" for key in ("chat_template_kwargs", "date", "system", "long_prompts")),
        *("model.name", "model.revision", "model.reference", "critic.model"),
        *("scorer[rule].function", "scorer[reward_model].model", "scorer[reward_model].revision"),
        "scorer[llm].revision",
    ],
    # The same model, up to rounding.
    MAY_CHANGE: [
        *("name", "storage_path", "track", "resources", "reference.place"),
        *("evaluate.*", "checkpoint.*", "strategy.*", "data.eval.*"),
        *(f"{source}.name" for source in SOURCES),
        *(f"{policy}.max_unlabelled_rounds" for policy in ROUNDS),
        *("data.on_bad_row", "data.max_bad_fraction"),
        *("model.gradient_checkpointing", "model.compile", "model.trust_remote_code"),
        *(f"rollout.{key}" for key in ("actors", "placement", "tensor_parallel", "gpu_memory_utilization")),
        *("rollout.transfer", "rollout.python"),
        *(f"scorer[rule].{key}" for key in ("unit", "description", "timeout_seconds")),
        *(
            f"scorer[llm].{key}"
            for key in ("base_url", "api_key_env", "timeout_seconds", "retry_seconds", "concurrency")
        ),
        *(f"optim.{key}" for key in ("tokens_per_micro_batch", "on_nonfinite", "max_skipped_in_a_row")),
    ],
}


def test_every_key_is_classified() -> None:
    whole = [entry.removesuffix("*") for entries in TABLE.values() for entry in entries if entry.endswith("*")]
    found: dict[object, set[str]] = {mark: set() for mark in TABLE}
    for path, mark in leaves(RunConfig):
        block = next((block for block in whole if path.startswith(block)), None)
        found[mark].add(path if block is None else f"{block}*")
    assert found == {mark: set(entries) for mark, entries in TABLE.items()}


OFF = ["model.name=m", "data={train: t.jsonl, eval: e.jsonl}", "method=dpo"]
ON = [*OFF, "data_policy=on_policy", "rollout.engine=hf", "scorer={name: rule, function: 'm:f', arguments: {k: 1}}"]
GROUPS = [*ON, "method=grpo", "data.eval=[]"]
LORA = [*OFF, "model.lora={}"]


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (OFF, ["name=other", "storage_path=/else/where", "track=[]", "checkpoint={every: 3, keep: 9}"]),
        (OFF, ["evaluate={every: 5, scorers: {name: rule, function: 'm:g'}}", "strategy={name: ddp, workers: 4}"]),
        (OFF, ["optim.tokens_per_micro_batch=99", "optim={on_nonfinite: skip, max_skipped_in_a_row: 9}"]),
        (OFF, ["model={gradient_checkpointing: true, compile: true, trust_remote_code: true, name: m}"]),
        (
            OFF,
            [
                "data.max_bad_fraction=0.5",
                "data.on_bad_row=fail",
                "data.eval=[]",
                "data.train={path: t.jsonl, name: x}",
            ],
        ),
        (OFF, ["data.train=/moved/here.jsonl", "model.name=/moved/model", "data.max_tokens=2000"]),
        (LORA, ["reference.place=trainer"]),
        (ON, ["rollout={engine: hf, actors: [0, 8], placement: separate, python: /venv/bin/python}"]),
        (ON, ["scorer.unit=share", "scorer.description=What it is."]),
        (ON, ["label=best_worst"]),
        (GROUPS, ["label=rewards"]),
        ([*GROUPS, "method=ppo"], ["critic={}"]),
    ],
)
def test_what_a_resumed_run_may_change(settings: list[str], changes: list[str]) -> None:
    for change in changes:
        assert identity(load_run(None, [*settings, change])).decides == identity(load_run(None, settings)).decides


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (OFF, ["seed=1", "method.beta=0.2", "method=ipo", "model.dtype=float32", "model.lora={}", "weighting=wpo"]),
        (OFF, ["optim.lr=1e-3", "optim.groups_per_step=8", "optim.steps=7", "optim.epochs=2", "optim.warmup=0"]),
        (OFF, ["data.train=[t.jsonl, u.jsonl]", "data.train={path: t.jsonl, weight: 2}", "data.stop=</s>"]),
        (OFF, ["filter.policy_logp_quantile=0.5", "auxiliary={data: s.jsonl}"]),
        (ON, ["rollout.samples=4", "rollout.temperature=0.7", "data_policy={name: on_policy, lag: 1}"]),
        (ON, ["label={name: wpo}", "label={name: bradley_terry}", "scorer.arguments.k=2"]),
        ([*ON, "label={name: wpo, threshold: 3}"], ["label.threshold=4", "label.gap=2", "label.rejected=minimum"]),
        ([*ON, "label={name: bradley_terry}"], ["label.scale=5"]),
        ([*GROUPS, "method=ppo"], ["critic.lr=1e-7"]),
    ],
)
def test_what_makes_another_run(settings: list[str], changes: list[str]) -> None:
    for change in changes:
        assert identity(load_run(None, [*settings, change])).decides != identity(load_run(None, settings)).decides
