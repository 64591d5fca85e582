"""The exact words that answer the mistakes people make."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Refused

from rayalign.config import ConfigError, load_run


def test_every_mistake_is_reported_in_the_order_of_the_file(refused: Refused) -> None:
    text = """\
method: {name: dpo, betta: 0.1}
optim:
  learning_rate: 5e-7
  schedule: cosin
  groups_per_step: 0
strategy: {name: single, workers: 4}
"""
    assert refused(text) == [
        "run.yaml:3: method.betta: unknown key of dpo; did you mean method.beta?",
        "run.yaml:5: optim.learning_rate: unknown key; did you mean optim.lr?",
        "run.yaml:6: optim.schedule: 'cosin' is none of cosine | linear | constant; did you mean cosine?",
        "run.yaml:7: optim.groups_per_step: 0 must be at least 1",
        "run.yaml:8: strategy: single trains in one process; for workers: 4 write name: ddp or fsdp2",
    ]


def test_a_date_that_is_none() -> None:
    with pytest.raises(ConfigError, match="data.date: 'tomorrow' is not a date such as 2024-07-26"):
        load_run(None, ["model.name=m", "data={train: t, date: tomorrow}", "method=dpo"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method: {name: dpo, beta: high}", "method.beta: 'high' is not a number"),
        ("method: {name: dpo, beta: -1}", "method.beta: -1 must be greater than 0"),
        ("method: {beta: 0.1}", "method: needs a name, such as method: {name: dpo, beta: 0.1}"),
        ("method: exo_pair", "method: 'exo_pair' is another project's name; write exo_pref"),
        (
            "method: dpo\noptim: {max_skipped_in_a_row: 9}",
            "optim: stop skips no step: remove max_skipped_in_a_row, or write on_nonfinite: skip",
        ),
        (
            f"method: dpo\nseed: {2**63}",
            "seed: a whole number of more than 63 bits is too large; write 9223372036854775807 at most",
        ),
        (
            f"method: dpo\noptim: {{steps: {10**400}}}",
            "optim.steps: a whole number of more than 63 bits is too large; write 9223372036854775807 at most",
        ),
        (
            "method: dpo\nlabel: {gap: 2}",
            "label: best_worst does not read gap: remove it, or write name: wpo",
        ),
        (
            "method: dpo\nlabel: {name: wpo, scale: 2}",
            "label: wpo does not read scale: remove it, or write name: bradley_terry",
        ),
        (
            "method: dpo\ndata_policy: {name: hybrid, mix: candidates, on_fraction: 0.3}",
            "data_policy: mix: candidates has both kinds in every group: remove on_fraction, or write mix: groups",
        ),
        (
            "method: dpo\ncheckpoint: {best: {metric: loss}}",
            "checkpoint.best.mode: missing; this key is required",
        ),
        (
            "method: dpo\nauxiliary: {data: 'rows.py:make'}",
            "auxiliary[0].data[0].path: 'rows.py:make' is no file or dataset; write {function: 'rows.py:make'} for a "
            "maker of rows, or {path: …, split: …} for a dataset's split",
        ),
        ("method: dpo\nsteps: 10", "steps: unknown key; did you mean optim.steps?"),
        ("method: dpo\noptin: {lr: 1e-6}", "optin: unknown key; did you mean optim?"),
        ("method: {name: dpo, lr: 1e-6}", "method.lr: unknown key of dpo; did you mean optim.lr?"),
        ("method: {name: dpo, loss_type: ipo}", "method.loss_type: unknown key of dpo; write method: {name: ipo}"),
        (
            "method: Robust-DPO",
            "method: no method is called 'Robust-DPO'; did you mean robust_dpo? Your own is my_pkg.losses:METHOD",
        ),
        (
            "method: dpo\nreference: other",
            "reference: 'other' is given where a block of keys is expected; another reference model is model.reference",
        ),
        ("method: dpo\nbeta: 0.1", "beta: unknown key; did you mean method.beta?"),
        ("method: dpo\nloss_type: exo_pair", "loss_type: unknown key; write method: {name: exo_pref}"),
        ("method: dpo\nloss_type: ipo", "loss_type: unknown key; write method: {name: ipo}"),
        (
            "method: dpo\nuse_weighting: true",
            "use_weighting: unknown key; write weighting: {name: wpo}, or method: wpo",
        ),
        ("method: dpo\noptim:", "optim: nothing is given where a block of keys is expected, such as key: value"),
        ("method: dpo\noptim: {steps: 2, epochs: 1}", "optim: give steps or epochs, not both"),
        (
            "method: dpo\noptim: {warmup: 2.5}",
            "optim: warmup 2.5 is neither a fraction below 1 nor a whole number of steps",
        ),
        ("method: dpo\noptim: {steps: 10, warmup: 20}", "optim: warmup of 20 steps is longer than the run of 10"),
        ("method: dpo\noptim: {steps: 1.5}", "optim.steps: 1.5 is not a whole number"),
        (
            "method: dpo\nstrategy: {name: ddp, workers: many}",
            "strategy.workers: 'many' is neither a number, [smallest, largest] nor auto",
        ),
        (
            "method: dpo\nstrategy: {name: ddp, workers: 0}",
            "strategy.workers: 0 is less than 1; write at least 1, [smallest, largest] or auto",
        ),
        (
            "method: dpo\nstrategy: {name: ddp, workers: [8, 2]}",
            "strategy.workers: [8, 2] is no range: write [smallest, largest]",
        ),
        ("method: dpo\nstrategy: {name: ddp, workers: [0, 2]}", "strategy: workers must be at least 1"),
        ("method: dpo\ndata_policy: off", "data_policy: off is a boolean in YAML; write off_policy"),
        ("method: dpo\ndata_policy: {name: on}", "data_policy: on is a boolean in YAML; write on_policy"),
        (
            "method: dpo\ndata_policy: offpolicy",
            "data_policy: 'offpolicy' is none of off_policy | on_policy | hybrid; did you mean off_policy?",
        ),
        (
            "method: dpo\ndata_policy: {name: off_policy, lag: 1}",
            "data_policy.lag: unknown key; the keys here are name",
        ),
        (
            "method: {name: exo_rw, behavior_correction: off}",
            "method.behavior_correction: off is a boolean in YAML; quote it: 'off'",
        ),
        ("method: dpo\nstorage_path: no", "storage_path: no is a boolean in YAML; quote it"),
        ("method: dpo\nstorage_path: 7", "storage_path: 7 is not text; quote it"),
        ("method: dpo\ntrack: [mlflow]", "track[0]: 'mlflow' is none of tensorboard | wandb"),
        ("method: dpo\nconfig_version: 2", "config_version: 2 is none of 1"),
        ("method: dpo\nscorer: {function: f}", "scorer: needs a name: write name first"),
        ("method: dpo\nseed: true", "seed: true is a boolean in YAML; write a number"),
        ("method: dpo\noptim: {lr: yes}", "optim.lr: true is a boolean in YAML; write a number"),
        ("method: dpo\noptim: {betas: [0.9, on]}", "optim.betas: true is a boolean in YAML; write a number"),
        ("method: {name: dpo, beta: off}", "method.beta: false is a boolean in YAML; write a number"),
        (
            "method: dpo\noptim: {max_grad_norm: 0}",
            "optim.max_grad_norm: 0 would scale every gradient to nothing; write null to clip none",
        ),
        (
            "method: dpo\noptim: adamw_torch",
            "optim: 'adamw_torch' is given where a block of keys is expected; the optimizer is AdamW in float32: write "
            "optim: {lr: …, betas: […], eps: …, weight_decay: …}",
        ),
        ("method: {name: grpo}\nbeta: 0.1", "beta: unknown key; did you mean method.kl_coef?"),
        (
            "method: dpo\nstorage_path: s3://key:secret@bucket/x",
            "storage_path: a URI with a password; give credentials by the environment",
        ),
    ],
)
def test_one_mistake(refused: Refused, line: str, message: str) -> None:
    number = 2 + len(line.splitlines())
    assert refused(line + "\n") == [f"run.yaml:{number}: {message}"]


@pytest.mark.parametrize(
    ("minimal", "message"),
    [
        (
            "data: {train: a.jsonl}\nmethod: dpo\n",
            "run.yaml: model: missing; say which model to train: model: {name: path-or-hub-id}",
        ),
        (
            "model: {}\ndata: {train: a.jsonl}\nmethod: dpo\n",
            "run.yaml:1: model.name: missing; say which model to train: a folder, or a name on the hub",
        ),
        (
            "model: gpt2\ndata: {train: a.jsonl}\nmethod: dpo\n",
            "run.yaml:1: model: 'gpt2' is given where a block of keys is expected; write model: {name: path-or-hub-id}",
        ),
        (
            "model: {name: a}\ndata: {train: []}\nmethod: dpo\n",
            "run.yaml:2: data.train: is empty; name at least one",
        ),
        (
            "model: {name: a}\ndata: {train: [{}]}\nmethod: dpo\n",
            "run.yaml:2: data.train[0]: a source of rows has either path or function",
        ),
        (
            "model: {name: a}\ndata: {train: [{function: f}]}\nmethod: dpo\n",
            "run.yaml:2: data.train[0].function: 'f' names no function; "
            "write module:callable, such as my_rewards:helpful",
        ),
        (
            "model: {name: a}\ndata: {train: a, max_tokens: 9}\nmethod: dpo\n",
            "run.yaml:2: data: max_tokens 9 counts prompt and response together: "
            "beside a prompt of max_prompt_tokens 512 no response fits",
        ),
        (
            "model: {name: a}\ndata: {train: a}\nmethod: ktoo\n",
            "run.yaml:3: method: no method is called 'ktoo'; did you mean kto? Your own is my_pkg.losses:METHOD",
        ),
        ("- a\n", "run.yaml: holds no keys; write name: value, one per line"),
        ("model: [\n", "run.yaml:2: is not valid YAML: expected the node content, but found '<stream end>'"),
        ("seed: 1\nmodel: {name: a}\nseed: 2\n", "run.yaml:3: seed: written twice, first in line 1; remove one"),
        ("on: 1\n", "run.yaml:1: on: is no text in YAML; quote the key"),
        ("a: &x {b: *x}\n", "run.yaml:1: a.b: an alias refers to the block that contains it; remove it"),
        ("grid: {}\n", "run.yaml: is a comparison; start it with: rayalign compare run.yaml"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(refused: Refused, minimal: str, message: str) -> None:
    (problem,) = refused("", minimal=minimal)
    assert problem == message


def test_long_names_are_answered_with_the_alphabet(refused: Refused) -> None:
    words = "is not made of letters, digits, '.', '_' and '-' only, beginning with a letter or digit, at most 128"
    assert refused("method: dpo\nname: a/b\n") == [f"run.yaml:4: name: 'a/b' {words}"]


def test_a_method_explains_its_own_parameters(refused: Refused) -> None:
    (message,) = refused("method: {name: exo_pref, label_smoothing: 0}\n")
    assert message.startswith(
        "run.yaml:3: method.label_smoothing: EXO's reverse KL to a label of certainty is infinite"
    )


def test_another_trainers_yaml_is_answered_key_by_key(refused: Refused) -> None:
    text = """\
model_name_or_path: mistral
dataset_name: ultrafeedback
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
lr_scheduler_type: cosine
warmup_ratio: 0.1
num_train_epochs: 1
max_length: 1024
bf16: true
logging_steps: 10
save_total_limit: 1
dataset_mixer: {a: 1.0}
"""
    batch = (
        "per-device batch × devices × gradient accumulation = optim.groups_per_step; "
        "memory is bounded by optim.tokens_per_micro_batch"
    )
    sources = "write data.train: [{path: name-or-file, split: …, config: …, columns: …, weight: …}, …]"
    assert refused(text, minimal="")[-12:] == [
        "run.yaml:1: model_name_or_path: unknown key; did you mean model.name?",
        f"run.yaml:2: dataset_name: unknown key; {sources}",
        f"run.yaml:3: per_device_train_batch_size: unknown key; {batch}",
        f"run.yaml:4: gradient_accumulation_steps: unknown key; {batch}",
        "run.yaml:5: lr_scheduler_type: unknown key; did you mean optim.schedule?",
        "run.yaml:6: warmup_ratio: unknown key; did you mean optim.warmup?",
        "run.yaml:7: num_train_epochs: unknown key; did you mean optim.epochs?",
        "run.yaml:8: max_length: unknown key; did you mean data.max_tokens?",
        "run.yaml:9: bf16: unknown key; write model.dtype: bfloat16 or float32 (auto is bfloat16 on CUDA); parameters "
        "and optimizer are float32, and float16 is not run",
        "run.yaml:10: logging_steps: unknown key; every step is written to metrics.jsonl, and logs lie under "
        "<storage_path>/<name>; remove it",
        "run.yaml:11: save_total_limit: unknown key; did you mean checkpoint.keep?",
        f"run.yaml:12: dataset_mixer: unknown key; {sources}",
    ]


def test_layers_may_be_named_as_others_name_them() -> None:
    base = ["model.name=m", "data.train=t.jsonl", "method=dpo"]
    for given, layers in {
        "all-linear": (),
        "q_proj": ("q_proj",),
        "q_proj, v_proj": ("q_proj", "v_proj"),
        "[q_proj, v_proj]": ("q_proj", "v_proj"),
        "[]": (),
    }.items():
        run = load_run(None, [*base, f"model.lora.target_modules={given}"])
        assert run.model.lora is not None and run.model.lora.target_modules == layers


def test_clipping_can_be_off() -> None:
    run = load_run(None, ["model.name=m", "data.train=t.jsonl", "method=dpo", "optim.max_grad_norm=null"])
    assert run.optim.max_grad_norm is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"


def test_mistakes_on_the_command_line_say_so(refused: Refused) -> None:
    assert refused("method: dpo\n", "optim.rl=1", "seed=-1") == [
        "command line: optim.rl: unknown key; the keys here are lr, steps, epochs, groups_per_step, "
        "tokens_per_micro_batch, schedule, warmup, min_lr_ratio, max_grad_norm, betas, eps, weight_decay, "
        "on_nonfinite, max_skipped_in_a_row",
        "command line: seed: -1 must be at least 0",
    ]
    assert refused("method: dpo\nseed: 1\n", "--fast", "seed.a=1", "data.train=[", "=3") == [
        "command line: --fast: is not key=value, such as optim.lr=1e-6",
        "command line: seed.a: seed is 1, which has no keys; override it as a whole",
        "command line: data.train: '[' is not valid YAML; quote it",
        "command line: is not key=value, such as optim.lr=1e-6",
    ]
