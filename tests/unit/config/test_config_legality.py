"""What cannot be combined is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MINIMAL, Refused

from rayalign.config import load_run
from rayalign.config.legality import violations
from rayalign.config.scoring import EvaluateConfig

OFFLINE = ["model.name=gpt2", "data.train=pairs.jsonl"]
RULE = "{name: rule, function: 'm:f'}"
NEVER = "data_policy={name: on_policy, refresh_every: never}"
ON_POLICY = ["data_policy=on_policy", "rollout.samples=4", f"scorer={RULE}"]


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            ["method=reward_model", *ON_POLICY],
            ["data_policy: reward_model cannot learn on_policy: there is no policy to draw from; "
             "write data_policy: off_policy"],
        ),
        (
            ["method=dpo", "rollout.samples=4", "label=best_worst", f"scorer={RULE}"],
            ["rollout: off_policy draws no completions; remove rollout, or write data_policy: on_policy or hybrid",
             "label: off_policy trusts the stored labels; remove label, or write label: {relabel: true}",
             "scorer: off_policy scores nothing unless label: {relabel: true}; remove it, "
             "or move it to evaluate.scorers"],
        ),
        (
            ["method=dpo", "data_policy=on_policy"],
            ["rollout: on_policy draws completions; say how: rollout: {engine: vllm, samples: 8}",
             "scorer: on_policy needs a scorer, such as scorer: {name: rule, function: …}"],
        ),
        (
            ["method=dpo", "data_policy=hybrid", f"scorer={RULE}", "rollout.samples=1"],
            ["rollout.samples: dpo compares completions of one prompt; write at least 2"],
        ),
        (
            ["method=dpo", *ON_POLICY, "filter.policy_logp_quantile=0.7"],
            ["filter: on_policy has no stored pairs to choose from; remove filter, or write data_policy: off_policy"],
        ),
        (
            ["method=dpo", *ON_POLICY, "data_policy={name: hybrid, mix: candidates}",
             "filter.policy_logp_quantile=0.7"],
            ["filter: mix: candidates labels stored and fresh completions of a prompt together, so no pair is stored "
             "whole to be kept or left out; write mix: groups, or remove filter"],
        ),
        (
            ["method=dpo", "strategy=deepspeed", "model.compile=true"],
            ["model.compile: deepspeed trains no compiled model; write strategy: single, ddp or fsdp2"],
        ),
        (
            ["method=dpo", "strategy=deepspeed", "optim.on_nonfinite=skip"],
            ["optim.on_nonfinite: deepspeed may have updated weights before a value is found not finite; write stop, "
             "or strategy: fsdp2"],
        ),
        (
            ["method=dpo", "evaluate={prompts: p.jsonl, sampling: {temperature: 0.7}}",
             "strategy={name: deepspeed, workers: [1, 2]}"],
            ["evaluate.sampling: the KL is measured at temperature 1 and top_p 1; remove both",
             "strategy.workers: deepspeed resumes with as many workers only; write one number"],
        ),
        (
            ["method=dpo", "evaluate={prompts: p.jsonl, sampling: {top_p: 0.9}}"],
            ["evaluate.sampling: the KL is measured at temperature 1 and top_p 1; remove both"],
        ),
        (
            ["method=dpo", "label.relabel=true"],
            ["scorer: label: {relabel: true} needs a scorer, such as scorer: {name: rule, function: …}"],
        ),
        (
            ["method=dpo", "checkpoint.best={metric: eval_loss, mode: min}"],
            ["checkpoint.best.metric: no row of metrics has eval_loss: data.eval names no rows; write a metric of "
             "training, such as loss"],
        ),
        (
            ["method=dpo", "data.eval=held.jsonl", "checkpoint={every: 50, best: {metric: eval_loss, mode: min}}"],
            ["checkpoint.best.metric: eval_loss is measured after the last step only, whose checkpoint is kept anyway; "
             "write evaluate: {every: 50}"],
        ),
        (
            ["method=dpo", *ON_POLICY, "label.relabel=true"],
            ["label.relabel: on_policy has no stored completions to label again; remove relabel"],
        ),
        (
            ["method=exo_rw", *ON_POLICY, "label=best_worst", "rollout.top_p=0.9"],
            ["label.name: best_worst makes pairs, and exo_rw learns from groups; write label: rewards",
             "rollout.top_p: exo_rw needs the density of every completion, which truncated sampling does not have; "
             "write 1.0"],
        ),
        (
            ["method=dpo", *ON_POLICY, "label=rewards"],
            ["label.name: rewards keeps every completion, and dpo learns from preferences; write label: best_worst"],
        ),
        (
            ["method=kto", *ON_POLICY, "label=best"],
            ["label.name: best keeps one completion, and kto learns from preferences; write label: best_worst"],
        ),
        (
            ["method=sft", *ON_POLICY, "label=best_worst"],
            ["label.name: best_worst makes pairs, and sft learns from one completion of a prompt; write label: best"],
        ),
        (
            ["method=sft", *ON_POLICY, "label='rules:mine'"],
            ["label.name: rules:mine makes pairs, and sft learns from one completion of a prompt; write label: best"],
        ),
        (
            ["method=exo_rw", *ON_POLICY, "label='rules:mine'"],
            ["label.name: rules:mine makes pairs, and exo_rw learns from groups; write label: rewards"],
        ),
        (
            ["method=rloo"],
            ["data_policy: rloo cannot learn off_policy: its ratio needs each token's log-probability under the policy "
             "that drew it, which stored rows lack; write data_policy: on_policy"],
        ),
        (
            ["method=grpo", "data_policy={name: hybrid, mix: candidates}", "rollout.samples=4", f"scorer={RULE}"],
            ["data_policy: grpo cannot learn hybrid: its ratio needs each token's log-probability under the policy "
             "that drew it, which stored rows lack; write data_policy: on_policy"],
        ),
        (
            ["method=grpo", "data_policy=on_policy", "rollout.samples=1"],
            ["scorer: on_policy needs a scorer, such as scorer: {name: rule, function: …}",
             "rollout.samples: grpo compares completions of one prompt; write at least 2"],
        ),
        (
            ["method=rloo", *ON_POLICY, "label=best_worst", "rollout.top_p=0.9", "rollout.temperature=0.7"],
            ["method.logit_temperature: 1 is not the temperature that completions are drawn at, 0.7: the ratio of "
             "rloo would compare two temperatures; write 0.7",
             "label.name: best_worst makes pairs, and rloo learns from groups; write label: rewards",
             "rollout.top_p: rloo needs the density of every completion, which truncated sampling does not have; "
             "write 1.0"],
        ),
        (
            ["method=rloo", "data_policy={name: on_policy, refresh_every: 6, passes: 4}", *ON_POLICY[1:]],
            ["data_policy.refresh_every: counts the steps of all 4 passes over a round; 6 is no multiple of 4"],
        ),
        (
            ["method=rloo", "data_policy={name: on_policy, refresh_every: never, passes: 2}", *ON_POLICY[1:]],
            ["data_policy.passes: what is drawn once is trained on again in every epoch; write optim.epochs or more "
             "optim.steps"],
        ),
        (
            ["method=rloo", *ON_POLICY, "critic.lr=1e-5"],
            ["critic: rloo trains no critic; remove it"],
        ),
        (
            ["method=ppo", "data_policy={name: on_policy, refresh_every: never}", *ON_POLICY[1:]],
            ["data_policy.refresh_every: ppo's critic values each round again, and what is drawn once is no round; "
             "write a number of steps"],
        ),
        (
            ["method={name: ppo, target_kl: 0.02}", *ON_POLICY],
            ["data_policy.passes: ppo skips further passes over a round once kl/behavior_k3 is above 0.02, and there "
             "is one pass only; write passes: 4, or remove the limit"],
        ),
        (
            ["method=ppo", "critic.lr=1e-5"],
            ["data_policy: ppo cannot learn off_policy: its ratio needs each token's log-probability under the policy "
             "that drew it, which stored rows lack; write data_policy: on_policy"],
        ),
        (
            ["method=ppo", "data_policy=on_policy", "rollout.samples=1", "rollout.top_p=0.9"],
            ["scorer: on_policy needs a scorer, such as scorer: {name: rule, function: …}",
             "rollout.top_p: ppo needs the density of every completion, which truncated sampling does not have; "
             "write 1.0"],
        ),
        (
            ["method=grpo", "data.eval=e.jsonl", *ON_POLICY],
            ["data.eval: grpo has no loss on stored rows; remove it, or write evaluate: {…}, which takes its prompts"],
        ),
        (
            ["method=grpo", "weighting=wpo", *ON_POLICY],
            ["weighting: WPO weighs preference pairs or KTO's examples, and method 'grpo' learns from neither"],
        ),
        (
            ["method=dpo", *ON_POLICY, "data_policy={name: on_policy, lag: 1}", "rollout.placement=shared",
             "rollout.tensor_parallel=2", "rollout.transfer=nixl", "rollout.engine=hf"],
            ["rollout.placement: shared lets training wait while rounds are drawn, so that lag must be 0; write lag: 0",
             "rollout.tensor_parallel: hf samples on one device; write 1, or engine: vllm",
             "rollout.tensor_parallel: shared gives an actor a part of one device; write 1, or separate",
             "rollout.transfer: nixl brings whole weights to one device, and tensor_parallel reads parts from a "
             "folder; write object_store, or tensor_parallel: 1"],
        ),
        (
            ["method={name: exo_rw, behavior: assume_reference}", *ON_POLICY],
            ["method.behavior: assume_reference takes every candidate as the reference's, and rounds are drawn from "
             "the trained policy; remove it, or write data_policy: {name: on_policy, refresh_every: never}"],
        ),
        (
            ["method=mpo"],
            ["auxiliary: mpo's protection against drift is auxiliary data; name it, such as "
             "auxiliary: [{term: reference, data: [sft.jsonl]}], or write auxiliary: [] for the preference term alone "
             "(called mpo (no KL) in every table)"],
        ),
        (
            ["method=dpo", "auxiliary=[{data: a.jsonl}, {data: b.jsonl}]"],
            ["auxiliary: two streams are called sft; give each its own name"],
        ),
        (
            ["method=simpo", "model.reference=other"],
            ["model.reference: simpo has no reference and nothing is evaluated; remove it"],
        ),
        (
            ["method=simpo", "reference.dtype=float32"],
            ["reference: simpo has no reference and nothing is evaluated; remove it"],
        ),
        (
            ["method=grpo", *ON_POLICY, "reference.place=trainer"],
            ["reference.place: grpo prepares whole rounds, which hold the reference's part; write pool"],
        ),
        (
            ["method=dpo", "reference.dtype=bfloat16", "model.dtype=float32"],
            ["reference.dtype: bfloat16 is for a reference that computes in bfloat16, and model.dtype: float32 does "
             "not; write auto"],
        ),
        (
            ["method=dpo", "model.lora.rank=4", "reference={place: trainer, dtype: bfloat16}"],
            ["reference.dtype: the adapter's own model is the reference, in float32; remove it"],
        ),
        (
            ["method=dpo", "evaluate={prompts: p.jsonl, sampling: {engine: vllm}}", "model.from_scratch=true"],
            ["evaluate.sampling.engine: vllm reads weights from a folder, and model.from_scratch has none; write hf"],
        ),
        (
            ["method=dpo", "model.lora.rank=8", "model.from_scratch=true"],
            ["model.lora: an adapter on untrained weights learns nothing; remove lora or from_scratch"],
        ),
        (
            ["method={name: reward_model, logit_temperature: 2}", "auxiliary.data=a.jsonl", "evaluate.prompts=p.jsonl"],
            ["method.logit_temperature: reward_model has no logits to divide; remove it",
             "auxiliary: reward_model has no vocabulary, so further data have no likelihood; remove it",
             "evaluate: reward_model trains no policy, so there is nothing to sample; leave only every or at, which "
             "say when data.eval is measured"],
        ),
        (
            ["method=reward_model", "model.reference=other", "evaluate.every=5", "data.eval=e.jsonl"],
            ["model.reference: reward_model has no reference and nothing is evaluated; remove it"],
        ),
        (
            ["method=dpo", "evaluate.at=[5, 20]", "optim.steps=10"],
            ["evaluate.prompts: there is nothing to evaluate on; name a file here or in data.eval",
             "evaluate.at: step 20 is never reached: optim.steps is 10"],
        ),
    ],
)  # fmt: skip
def test_illegal_combinations(refused: Refused, settings: list[str], messages: list[str]) -> None:
    found = refused("{}", *OFFLINE, *settings, minimal="")
    assert [message.removeprefix("command line: ").removeprefix("run.yaml: ") for message in found] == messages


@pytest.mark.parametrize("method", ["wpo", "sft", "reward_model", "exo_rw"])
def test_weights_go_only_on_unweighted_preferences(refused: Refused, method: str) -> None:
    (message,) = refused("{}", *OFFLINE, f"method={method}", "weighting=wpo", minimal="")
    assert message.startswith("command line: weighting: ")
    assert f"'{method}'" in message


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["method=dpo"], "dpo"),
        (["method=wpo"], "wpo"),
        (["method=ipo", "weighting=wpo"], "ipo + wpo"),
        (["method=kto", "weighting=wpo"], "kto + wpo"),
        (["method=dpo", "weighting.permute=true"], "dpo + permuted wpo"),
        (["method=dpo", "auxiliary.data=a.jsonl"], "dpo + sft"),
        (["method=dpo", "filter.policy_logp_quantile=0.7"], "dpo + filter 0.7"),
        (
            ["method=dpo", *ON_POLICY, "data_policy=hybrid", "filter.policy_logp_quantile=0.95", "weighting=wpo"],
            "dpo + wpo + filter 0.95",
        ),
        (["method=kto", "label.relabel=true", f"scorer={RULE}", "filter.policy_logp_quantile=0.5"], "kto + filter 0.5"),
        (["method=mpo", "auxiliary.data=a.jsonl"], "mpo"),
        (["method=mpo", "auxiliary=[]"], "mpo (no KL)"),
        (["method=mpo", "auxiliary=[]", "weighting=wpo"], "mpo (no KL) + wpo"),
        (["method=simpo", "model.reference=other", "evaluate.prompts=p.jsonl"], "simpo"),
        (["method=dpo", "label.relabel=true", f"scorer={RULE}"], "dpo"),
        (["method=reward_model", "label.relabel=true", f"scorer={RULE}"], "reward_model"),
        (["method=reward_model", "label={name: rewards, relabel: true}", f"scorer={RULE}"], "reward_model"),
        (["method={name: rloo, logit_temperature: 0.7}", *ON_POLICY, "rollout.temperature=0.7"], "rloo"),
        (["method=reinforce_pp", "data_policy=on_policy", "rollout.samples=1", f"scorer={RULE}"], "reinforce_pp"),
        (["method=grpo", "data_policy={name: on_policy, refresh_every: 8, passes: 4}", *ON_POLICY[1:]], "grpo"),
        (["method=ppo", "data_policy=on_policy", "rollout.samples=1", f"scorer={RULE}", "critic.model=rm"], "ppo"),
        (
            ["method={name: ppo, target_kl: 0.02}", "data_policy={name: on_policy, refresh_every: 8, passes: 4}",
             *ON_POLICY[1:], "critic.lr=1e-5", "auxiliary.data=a.jsonl"],
            "ppo + sft",
        ),
        (["method=grpo", NEVER, *ON_POLICY[1:], "label=rewards"], "grpo"),
        (["method=sft", *ON_POLICY, "label=best"], "sft"),
        (["method=rloo", "data.eval=e.jsonl", "evaluate.scorers=[]", *ON_POLICY], "rloo"),
        (["method.name=exo_rw", "method.behavior=assume_reference", *ON_POLICY, NEVER], "exo_rw"),
    ],
)  # fmt: skip
def test_legal_runs_and_what_tables_call_them(settings: list[str], name: str) -> None:
    assert load_run(None, [*OFFLINE, *settings]).display_name == name


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["strategy=ddp", "optim.steps=3", "model.from_scratch=true"],
        ["strategy={name: deepspeed, workers: 2, zero_stage: 3, cpu_offload: true, config: ds.json}"],
        ["model.lora.rank=4", "reference.place=trainer"],
        ["model.lora.rank=4", "method=ppo", "data_policy=on_policy", "rollout.samples=1", f"scorer={RULE}"],
        ["strategy={name: ddp, workers: [1, 2]}"],
        ["strategy={name: fsdp2, workers: 2, cpu_offload: true, sync_every_micro_batch: true}"],
        ON_POLICY,
        ["label.relabel=true", f"scorer={RULE}"],
        [*ON_POLICY, "rollout.actors=[1, 2]", "rollout.placement=separate"],
        ["strategy={name: deepspeed, zero_stage: 3}", "model.lora.rank=4", "reference.place=trainer"],
        ["strategy=fsdp2", "model.compile=true", "model.gradient_checkpointing=true"],
        ["strategy=fsdp2", "optim={on_nonfinite: skip, max_skipped_in_a_row: 9}"],
        ["evaluate.prompts=p.jsonl", "evaluate.judge={name: llm, model: m, base_url: 'http://u'}"],
        ["evaluate={prompts: p.jsonl, scorers: {name: llm, model: m, engine: hf}, baseline: other}"],
        [*ON_POLICY, "data_policy=on_policy", "storage_path=s3://bucket/runs"],
        [*ON_POLICY, "data_policy=hybrid", "storage_path=s3://bucket/runs"],
        ["method=reward_model", "evaluate.every=5", "data.eval=e.jsonl"],
        ["method=reward_model", "strategy=fsdp2", "model.lora.rank=4"],
    ],
)  # fmt: skip
def test_what_is_legal(settings: list[str]) -> None:
    assert violations(load_run(None, [*OFFLINE, "method=dpo", *settings])) == []


def test_a_policy_with_a_head_of_its_own_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_heads.py").write_text(
        "from dataclasses import replace\n"
        "from rayalign.methods.dpo import METHOD as DPO\n"
        "METHOD = replace(DPO, name='two', needs=DPO.needs | {'value'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (message,) = refused("method: {name: 'two_heads:METHOD'}")
    assert message.endswith("method: two needs a scalar head beside the policy's log-probabilities")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["auxiliary=[{name: train, data: a.jsonl}]"], "auxiliary[0].name: train is the stream of data.train"),
        (["filter.policy_logp_quantile=1"], "filter.policy_logp_quantile: 1 must be less than 1"),
        (["filter.policy_logp_quantile=0"], "filter.policy_logp_quantile: 0 must be greater than 0"),
        (["filter={}"], "filter.policy_logp_quantile: missing; say which pairs are kept"),
        (["filter=0.7"], "filter: 0.7 is given where a block of keys is expected"),
        (["filter.quantile=0.7", "filter.policy_logp_quantile=0.7"], "filter.quantile: unknown key"),
        (["optim.schedule=constant", "optim.min_lr_ratio=0.1"], "optim: a constant schedule ends at lr"),
        (["data.eval=[{path: e.jsonl, weight: 2}]"], "data.eval: every row is measured once"),
        (
            ["evaluate.prompts={path: p.jsonl, weight: 2}"],
            "evaluate.prompts: every row is measured once; remove weight",
        ),
        (["data.train=[{path: t.jsonl, split: test}]"], "data.train[0]: split belongs to a dataset"),
        (["data.train=[{path: ./d, columns: {promt: q}}]"], "data.train[0].columns.promt: no row has a field 'promt'"),
        (["model.name=./folder", "model.revision=main"], "model.revision: is of a model on the hub"),
        (["name=artifacts"], "name: artifacts is the folder of the stages"),
    ],
)
def test_settings_that_nothing_would_read(refused: Refused, settings: list[str], message: str) -> None:
    (found,) = refused("method: dpo", *settings)
    assert message in found


def test_only_on_policy_has_rounds(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "round_losses.py").write_text(
        "from dataclasses import replace\n"
        "from rayalign.methods.dpo import METHOD as DPO\n"
        "METHOD = replace(DPO, name='rounds', round_prepare=print)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (message,) = refused("method: {name: 'round_losses:METHOD'}")
    assert message.endswith(
        "data_policy: rounds prepares whole rounds, which only on_policy has; write data_policy: on_policy"
    )
    assert violations(load_run(None, [*OFFLINE, "method.name=round_losses:METHOD", *ON_POLICY])) == []


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{name: llm, model: m}", "say where the model is: base_url: https://… or engine: hf | vllm"),
        ("{name: llm, model: m, base_url: 'http://u', engine: hf}", "say where the model is"),
        ("{name: llm, model: m, base_url: u}", "base_url: 'u' is no address; write https://host/v1"),
        ("{name: llm, model: m, base_url: 'http://u', revision: v1}", "revision is of a model that engine loads"),
        ("{name: llm, model: m, engine: hf, concurrency: 9}", "concurrency is of an endpoint; a model that engine"),
        ("{name: llm, model: m, engine: hf, retry_seconds: 9}", "retry_seconds is of an endpoint"),
        ("{name: llm, model: m, base_url: 'http://u', timeout_seconds: 0}", "timeout_seconds: "),
        ("{name: rule, function: 'm:f', timeout_seconds: -1}", "timeout_seconds: "),
        ("{name: rule, function: 'm:f', timeout_seconds: .inf}", "timeout_seconds: "),
        ("{name: llm, model: m, engine: hf, api_key_env: KEY}", "api_key_env is of an endpoint"),
        ("{name: llm, model: m, base_url: 'http://me:secret@u'}", "a URI with a password"),
    ],
)
def test_a_model_that_is_asked_is_in_one_place(refused: Refused, judge: str, message: str) -> None:
    (found,) = refused(f"method: dpo\nevaluate: {{prompts: p.jsonl, judge: {judge}}}\n")
    assert "run.yaml:4: evaluate.judge" in found and message in found and "secret" not in found


def test_models_of_engines_and_baselines_are_looked_for_beside_the_yaml(tmp_path: Path) -> None:
    for name in ("reference", "judge", "runs/other"):
        (tmp_path / name).mkdir(parents=True)
    path = tmp_path / "run.yaml"

    def evaluate(text: str) -> EvaluateConfig:
        path.write_text(f"{MINIMAL}method: dpo\nevaluate: {{prompts: p.jsonl, {text}}}\n")
        found = load_run(path).evaluate
        assert found is not None
        return found

    local = evaluate("judge: {name: llm, model: judge, engine: hf}, baseline: runs/other")
    assert local.judge is not None and local.judge.model == str(tmp_path / "judge")
    assert local.judge.label == "judge" and local.baseline == str(tmp_path / "runs/other")
    asked = evaluate("judge: {name: llm, model: judge, base_url: 'http://h'}")
    assert asked.judge is not None and asked.judge.model == "judge"
    assert asked.baseline == "reference"
