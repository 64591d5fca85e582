"""Keys of other trainers are answered: all that TRL has, and every line of a real-shaped file of each framework."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from rayalign.config import ConfigError, RunConfig, load_run
from rayalign.config.foreign import answers_within, foreign_advice, foreign_table
from rayalign.methods import METHODS as OURS
from rayalign.methods import resolve

FILES = sorted((Path(__file__).parents[2] / "fixtures" / "foreign").glob("*.yaml"))


def fields(annotation: Any) -> Iterator[str]:
    """Dotted names of all fields below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for key, field in annotation.model_fields.items():
            yield key
            yield from (f"{key}.{below}" for below in fields(field.annotation))
    else:
        for argument in get_args(annotation):
            yield from fields(argument)


PARAMETERS = {f"method.{key}" for name in OURS for key in resolve(name).config.model_fields}
SCHEMA = {*fields(RunConfig), *PARAMETERS}


# The table itself.


def test_every_answer_that_is_a_field_names_one_of_ours() -> None:
    known = foreign_table()
    named = {answer.ours for answer in known.answers.values()} | {answer.ours for _, answer in known.patterns}
    assert named - {""} - SCHEMA == set()


def test_every_answer_says_something_and_no_key_stands_twice() -> None:
    path = Path(__file__).parents[3] / "rayalign" / "config" / "foreign.yaml"
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["answers"]
    kinds = [[kind for kind in ("ours", "say", "method", "track") if entry.get(kind)] for entry in entries]
    assert [entry for entry, found in zip(entries, kinds, strict=True) if len(found) != 1] == []
    keys = [key for entry in entries for key in entry["keys"]]
    assert sorted({key for key in keys if keys.count(key) > 1}) == []


def test_values_that_a_sentence_tells_to_write_are_values_of_ours() -> None:
    """Of every ``block.key: value`` in a sentence, such as model.dtype: bfloat16."""
    known = foreign_table()
    said = {answer.say for answer in (*known.answers.values(), *(answer for _, answer in known.patterns))}
    examples = {(key, value) for text in said for key, value in re.findall(r"\b(\w+\.\w+): (\w+)", text)}
    examples |= {(key, value) for text in said for key, value in re.findall(r"\b(\w+\.\w+): \w+ or (\w+)", text)}
    assert {("model.dtype", "bfloat16"), ("model.dtype", "float32")} <= examples
    for key, value in examples & {(key, value) for key, value in examples if key in SCHEMA}:
        block, name = key.split(".")
        blocks = RunConfig.model_fields[block].annotation
        models = [
            kind for kind in (blocks, *get_args(blocks)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        field = models[0].model_fields[name]
        choices = [
            str(choice) for argument in (field.annotation, *get_args(field.annotation)) for choice in get_args(argument)
        ]
        assert not choices or value in choices or value in ("true", "false"), (key, value)


def test_foreign_names_of_methods_are_not_ours_and_lead_to_ours() -> None:
    known = foreign_table()
    assert (known.methods.keys() | known.unknown_methods) & set(OURS) == set()
    assert known.methods.keys() & known.unknown_methods == set()
    named = {name for said in known.methods.values() for name in re.findall(r"[a-z_]+", said)}
    for said in known.methods.values():
        assert set(re.findall(r"[a-z_]{3,}", said)) & set(OURS), said
    assert named & set(OURS)
    for method, renamed in known.parameters.items():
        fields = resolve(method).config.model_fields.keys()
        named = {said for said in renamed.values() if " " not in said}
        sentences = set(renamed.values()) - named
        assert named <= fields and not renamed.keys() & fields
        assert {field for said in sentences for field in re.findall(r"method\.(\w+)", said)} <= fields
    usual = {parameter for renamed in known.parameters.values() for parameter in renamed}
    every = {field for name in OURS for field in resolve(name).config.model_fields}
    assert set(known.aliases.values()) <= usual | every and not known.aliases.keys() & every


# What TRL has.


def trl_keys() -> list[str]:
    from transformers import TrainingArguments
    from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments

    kinds = (TrainingArguments, DPOConfig, KTOConfig, RewardConfig, GRPOConfig, ScriptArguments, ModelConfig)
    return sorted({field.name for kind in kinds for field in dataclasses.fields(kind)})


def test_every_key_of_trl_is_answered() -> None:
    """With a key of ours, or with what to do; those that we have too mean the same, or are blocks here."""
    keys = trl_keys()
    assert len(keys) > 200
    ours = {key for key in keys if key in RunConfig.model_fields}
    assert ours == {"seed", "optim"} and "optim" in foreign_table().blocks
    assert [key for key in keys if key not in ours and foreign_advice((key,), None) is None] == []


@pytest.mark.parametrize("key", ["label_smoothing_factor", "no_such_key", "polcy"])
def test_a_key_that_nobody_has_has_no_advice(key: str) -> None:
    assert (foreign_advice((key,), None) is None) == (key != "label_smoothing_factor")


# Whole files.


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_a_foreign_file_has_its_answer(path: Path) -> None:
    """In one short line each; what stands inside a block that is answered is answered with it."""
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    found = {
        int(problem.where.rpartition(":")[2]): problem for problem in caught.value.problems if ":" in problem.where
    }
    unanswered = [
        str(problem) for problem in caught.value.problems if problem.message.startswith("unknown key; the keys here")
    ]
    assert unanswered == [] and not any(problem.message == "unknown key" for problem in caught.value.problems)
    assert max(len(problem.message) for problem in caught.value.problems) < 180
    missing = [line for line in lines_to_answer(path) if line.isdisjoint(found)]
    assert missing == []


def lines_to_answer(path: Path) -> Iterator[set[int]]:
    """For every value that is no key of ours: its line, and those of the keys around it."""

    def walk(node: yaml.Node, around: set[int]) -> Iterator[set[int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not around and key.value == "seed":
                    continue
                yield from walk(value, {*around, key.start_mark.line + 1})
        elif isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
            for item in node.value:
                yield from walk(item, around)
        else:
            yield around

    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    ours = {"temperature", "top_p", "gpu_memory_utilization", "max_new_tokens", "max_tokens"}
    for lines in walk(root, set()):
        text = path.read_text(encoding="utf-8").splitlines()[max(lines) - 1]
        if not (path.stem.startswith("openrlhf_ppo") and any(f"  {key}:" in text for key in ours)):
            yield lines


def test_no_list_of_keys_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: m}\ndata: {train: t.jsonl}\nmethod: dpo\nfoo: 1\nbar: 2\noptim: {baz: 1, qux: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    messages = [problem.message for problem in caught.value.problems]
    assert [message.partition(";")[0] for message in messages] == ["unknown key"] * 4
    assert [";" in message for message in messages] == [True, False, True, False]


# Single answers.


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("loss_type",), "sigmoid", "write method: {name: dpo}"),
        (("loss_type",), ["sigmoid"], "write method: {name: dpo}"),
        (("loss_type",), "cdpo", "write method: {name: dpo, label_smoothing: …}"),
        (("loss_type",), "apo_zero", "no method here is apo_zero; see docs/explanation/methods.md, or write one"),
        (("loss_type",), ["sigmoid", "bco_pair"], "no method here is bco_pair"),
        (("loss_type",), 3, "the loss is the method: write method: {name: …}, one of dpo | "),
        (("rl",), "kto", "write method: {name: kto}"),
        (("stage",), "rm", "write method: {name: reward_model}"),
        (("report_to",), "none", "write track: []"),
        (("report_to",), ["wandb"], "write track: [wandb]"),
        (
            ("report_to",),
            ["mlflow", "tensorboard"],
            "write track: [tensorboard]; tensorboard and wandb are the trackers",
        ),
        (("report_to",), "all", "write track: [tensorboard, wandb]"),
        (("fp16",), True, "write model.dtype: bfloat16 or float32"),
        (("model", "lora", "r"), 8, "did you mean model.lora.rank?"),
        (("--learning-rate",), 1, "did you mean optim.lr?"),
        (("actor_rollout_ref", "actor", "optim", "lr"), 1, "did you mean optim.lr?"),
        (("critic", "optim", "lr"), 1, "did you mean critic.lr?"),
        (("rollout", "top_k"), 5, "samples are drawn from the whole distribution, or from its top_p"),
        (("data", "train", 0, "field_messages"), "c", "write data.train: [{path: …, columns: {prompt: …"),
    ],
)
def test_an_answer(path: tuple[str | int, ...], value: object, said: str) -> None:
    found = foreign_advice(path, value)
    assert found is not None and found.startswith(said)


def test_a_slip_in_a_block_of_ours_is_not_taken_for_another_trainers_key() -> None:
    assert foreign_advice(("optim", "rl"), "1e-6") is None  # axolotl's rl stands at the top
    assert foreign_advice(("no_such_key",), 1) is None
    assert foreign_advice(("optim", "weight_decay"), 0.1) is None  # where it is


def test_blocks_without_an_answer_are_looked_into() -> None:
    value = {"actor": {"optim": {"lr": 1, "foo": 2}}, "model": {"path": "m"}}
    found = dict(answers_within(("actor_rollout_ref",), value))
    assert found == {
        ("actor_rollout_ref", "actor", "optim", "lr"): "did you mean optim.lr?",
        ("actor_rollout_ref", "actor", "optim", "foo"): None,
        ("actor_rollout_ref", "model", "path"): "did you mean model.name?",
    }
    assert answers_within(("mine",), {"a": {"b": 1}}) == [(("mine",), None)]


FALSE_FRIENDS = [
    ("config: main", "config", "strategy.config"),
    ("policy: on_policy", "policy", "data_policy"),
    ("dataset_split: train", "dataset_split", "data_policy"),
    ("label_key: label", "label_key", "label?"),
    ("mix_strategy: concat", "mix_strategy", "strategy?"),
    ("rollout: {top_k: 50}", "rollout.top_k", "rollout.top_p?"),
    ("rollout: {stop: x}", "rollout.stop", "rollout.top_p?"),
    ("data: {train: [{path: t, confg: main}]}", "data.train[0].confg", "strategy.config"),
    ("optim: {step: no}", "optim.step", "optim.steps"),
]
"""(YAML, key, what it is not): likenesses of letters that mean other things, or could not have the value."""


@pytest.mark.parametrize(("line", "key", "friend"), FALSE_FRIENDS)
def test_false_friends_are_not_suggested(tmp_path: Path, line: str, key: str, friend: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{name: m}}\nmethod: dpo\n{line}\n" + ("" if "data:" in line else "data: {train: t.jsonl}\n")
    )
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    messages = {problem.field: problem.message for problem in caught.value.problems}
    assert "did you mean" not in messages[key] or friend not in messages[key]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("optim: {stpes: 5}", "did you mean optim.steps?"),
        ("optim: {step: 5}", "did you mean optim.steps?"),
        ("optim: {wramup: 5}", "did you mean optim.warmup?"),
        ("rollout: {sample: 5}", "did you mean rollout.samples?"),
        ("rollout: {temprature: 0.5}", "did you mean rollout.temperature?"),
        ("model: {name: m, gradient_checkpoint: true}", "did you mean model.gradient_checkpointing?"),
        ("groups_per_step: 8", "did you mean optim.groups_per_step?"),
        ("refresh_every: 8", "did you mean data_policy.refresh_every?"),
        ("method: {name: dpo, beat: 0.2}", "did you mean method.beta?"),
        ("method: {name: grpo, beta: 0.2}", "unknown key of grpo; did you mean method.kl_coef?"),
        ("method: {name: ipo, beta: 0.2}", "unknown key of ipo; did you mean method.tau?"),
        ("method: {name: sft, beta: 0.2}", "unknown key of sft; its keys are logit_temperature, reduction; beta is of"),
        ("method: {name: dpo, rpo_alpha: 1.0}", "of dpo; write auxiliary: [{name: sft, data: …, weight: …}]"),
        ("method: {name: dpo, pref_beta: 0.2}", "of dpo; did you mean method.beta?"),
        ("method: {name: dpo, kl_coef: 0.2}", "kl_coef is of grpo, ppo, reinforce_pp, rloo"),
        ("method: {name: dpo, epochs: 2}", "of dpo; did you mean optim.epochs?"),
        ("method: {name: dpo, use_vllm: true}", "of dpo; write rollout.engine: vllm or hf"),
        ("method: {name: dpo, Beta: 0.2}", "of dpo; did you mean method.beta?"),
        ("method: {name: ppo, cliprange: 0.2}", "of ppo; did you mean method.clip?"),
        ("method: {name: grpo, clip_ratio_high: 0.28}", "of grpo; did you mean method.clip_high?"),
        ("method: {name: kto, desirable_loss_weight: 1}", "of kto; did you mean method.desirable_weight?"),
        ("method: {name: simpo, gamma_beta_ratio: 0.5}", "of simpo; write method.gamma: beta × gamma_beta_ratio"),
        ("method: {name: slic, beta: 0.5}", "of slic; write method.delta: 1 / beta"),
        ("method: CPO", "'CPO' is another project's name; write dpo or simpo"),
        ("method: {name: RM}", "'RM' is another project's name; write reward_model"),
        ("Method: DPO", "did you mean method?"),
        ("SEED: 1", "did you mean seed?"),
        ("optim: {LR: 1}", "did you mean optim.lr?"),
        ("refrence: {model: x}", "did you mean reference?"),
        ("filters: {}", "did you mean filter?"),
        ("scorers: {name: rule}", "did you mean scorer?"),
        ("optim: {type: adamw}", "the optimizer is AdamW in float32"),
        ("evaluate: {steps: 5}", "did you mean evaluate.every?"),
        ("columns: {prompt: q}", "write data.train: [{path: …, columns: {prompt: …"),
        ("optim: {betas: [0.9, 0.99, 0.999]}", "[0.9, 0.99, 0.999] has 3 items; write 2 at most"),
        ("image_max_pixels: 5", "only text is trained"),
    ],
)
def test_slips_are_answered_with_the_key_that_was_meant(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    given = {"model": "model: {name: m}", "method": "method: dpo", "data": "data: {train: t.jsonl}"}
    kept = [own for key, own in given.items() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([line, *kept]) + "\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert any(said in problem.message for problem in caught.value.problems), caught.value


def test_no_suggestion_is_the_key_itself() -> None:
    """``method.beta: unknown key; did you mean method.beta?``: of every parameter under every method without it."""
    for name in OURS:
        for parameter in {key.removeprefix("method.") for key in PARAMETERS}:
            if parameter in resolve(name).config.model_fields:
                continue
            with pytest.raises((ConfigError, ValidationError)) as caught:
                load_run(None, ["model.name=m", "data.train=t", f"method.name={name}", f"method.{parameter}=0.5"])
            [message] = [line for line in str(caught.value).splitlines() if f"method.{parameter}:" in line]
            assert f"unknown key of {name}; " in message and f"did you mean method.{parameter}?" not in message


def test_a_method_of_others_is_answered_by_name(tmp_path: Path) -> None:
    for name in ("apo_zero", "sigmoid", "reinforce++"):
        with pytest.raises(ConfigError, match=r"docs/explanation/methods.md|write dpo|write reinforce_pp"):
            load_run(None, ["model.name=m", "data.train=t", f"method.name={name}"])


def test_difflib_agrees_that_the_false_friends_look_alike() -> None:
    """Or the tests above would show nothing."""
    likeness = [
        difflib.SequenceMatcher(None, *pair).ratio() for pair in (("policy", "data_policy"), ("top_k", "top_p"))
    ]
    assert min(likeness) > 0.65
