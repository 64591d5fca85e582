"""From a configuration to a job: what a run is, and data that its method cannot do without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from random_groups import random_groups
from tiny_runs import save_tiny
from tiny_tokenizers import CHATML, byte_level

from rayalign.config import load_run
from rayalign.config.data import TokenBudget
from rayalign.config.training import BestConfig
from rayalign.data.chat import make_chat
from rayalign.data.shard import write_shard
from rayalign.data.store import TokenStore, commit_store
from rayalign.data.tokenize_rows import Shape, Unit, prepare_rows, read_chunks
from rayalign.data.unpair import Mismatched
from rayalign.engine.model.scalar import ScalarHead
from rayalign.errors import UserError
from rayalign.placement import Node, Share, even_share
from rayalign.run.identity import run_identity
from rayalign.run.job import make_critic_spec, refuse_unsaved_best
from rayalign.run.model import model_spec
from rayalign.run.readers import refuse_unusable_models
from rayalign.run.resolve import resolve_run
from rayalign.run.rollouts import preparation, prompts_of, round_plan
from rayalign.run.streams import require_columns, steps_of_stream
from rayalign.runtime.session import Session

METHOD = """
from dataclasses import replace
from rayalign.methods.dpo import METHOD as DPO
METHOD = replace(DPO, name="own")
"""


ON_POLICY = ["model.name=m", "data.train=t.jsonl", "rollout.samples=4", "scorer={name: rule, function: 'm:f'}"]


def test_rounds_have_the_passes_and_the_preparation_of_the_configuration() -> None:
    def of(method: str, policy: str) -> tuple[int, str | None]:
        run = load_run(None, [*ON_POLICY, f"method={method}", f"data_policy={policy}"])
        prepared = preparation(run)
        assert run.drawing is not None
        plan = round_plan(run.drawing, run, refresh_every=4, steps=8)
        return plan.passes, prepared.key if prepared else None

    twice = "{name: on_policy, refresh_every: 4, passes: 2}"
    assert of("dpo", twice) == (2, None)
    passes, key = of("rloo", "on_policy")
    assert passes == 1 and key is not None
    assert of("rloo", twice) == (2, key)
    assert of("{name: rloo, kl_coef: 0.1}", twice)[1] != key  # other advantages
    assert of("grpo", twice)[1] != key


def test_rollouts_on_nodes_of_their_own_leave_those_that_are_there_to_training() -> None:
    """Two nodes of one GPU each for two workers; the eight of the rollouts are not there yet."""
    session = Session(
        started_here=False, nodes=tuple(Node(id=name, name=name, cpus=12.0, gpus=1.0) for name in ("one", "two"))
    )
    settings = [*ON_POLICY, "data_policy=on_policy", "method=dpo", "strategy={name: ddp, workers: 2}"]
    run = load_run(None, [*settings, "rollout.actors=[0, 8]", "rollout.placement=separate"])
    assert resolve_run(run, session).processes == 2
    assert even_share(session, 2, workers=2) == Share(cpus=12.0, gpus=1.0, threads=12)
    counted = resolve_run(load_run(None, [*settings, "rollout.actors=[0, 8]"]), session).processes
    with pytest.raises(UserError, match=r"3 processes need a GPU each, the cluster has 2: .*placement: separate"):
        even_share(session, counted, workers=2)


def test_an_epoch_of_prompts_takes_as_many_steps_as_there_are_passes(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    shard = write_shard(path, "0", random_groups([1] * 12, vocabulary=20))
    commit_store(path, [shard], meta={})
    stream = prompts_of([path], weights=[1.0], groups_per_step=4)
    for policy, steps in (("on_policy", 6), ("{name: on_policy, refresh_every: 3, passes: 3}", 18)):
        settings = [f"data_policy={policy}", "optim.epochs=2", "optim.groups_per_step=4", "method=rloo"]
        assert steps_of_stream(load_run(None, [*ON_POLICY, *settings]), stream) == steps


def test_a_run_of_ones_own_method_is_another_run_when_its_code_changes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: tiny}\ndata: {train: t.jsonl}\nmethod: identity_losses:METHOD\n")
    (tmp_path / "identity_losses.py").write_text(METHOD)
    run = load_run(path)
    first = run_identity(run, [])
    assert run_identity(run, []) == first
    (tmp_path / "identity_losses.py").write_text(METHOD + "# another line\n")
    assert run_identity(run, []) != first
    assert "method_source" not in run_identity(load_run(path, ["method=dpo"]), [])


def test_a_run_that_labels_its_rounds_is_another_run_when_the_rules_code_changes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "scores.py").write_text("def long(prompt, reply):\n    return len(reply)\n")
    (tmp_path / "rules.py").write_text("def widest(scores):\n    return 0, 1\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: tiny}\ndata: {train: t.jsonl}\nmethod: dpo\ndata_policy: on_policy\nrollout: {engine: hf}\n"
        "scorer: {name: rule, function: 'scores.py:long'}\nlabel: 'rules.py:widest'\n"
    )
    run = load_run(path)
    first = run_identity(run, [])
    assert run_identity(run, []) == first
    (tmp_path / "rules.py").write_text("def widest(scores):\n    return 1, 0\n")
    changed = run_identity(run, [])
    assert {key for key in changed if changed[key] != first[key]} == {"label"}
    for other in ("label=best_worst", "data_policy={name: on_policy, refresh_every: never}"):
        assert "label" not in run_identity(load_run(path, [other]), [])  # drawn once: in the digest of the data


def test_the_same_folder_in_another_place_is_the_same_run(tmp_path: Path) -> None:
    """As a job works in another copy of it whenever it is submitted; other contents are another run."""

    def identity(name: str, lines: str = "", family: str = "llama") -> dict[str, object]:
        folder = tmp_path / name
        save_tiny(folder / "tiny", family)
        (folder / "scores.py").write_text("def long(prompt, reply):\n    return len(reply)\n" + lines)
        (folder / "run.yaml").write_text(
            "model: {name: tiny, reference: ./tiny}\ndata: {train: t.jsonl}\nmethod: dpo\ndata_policy: on_policy\n"
            "rollout: {engine: hf}\nscorer: {name: rule, function: 'scores.py:long'}\n"
        )
        return run_identity(load_run(folder / "run.yaml"), [])

    first = identity("first")
    assert identity("second") == first
    edited, other = identity("edited", "# another line\n"), identity("other", family="gpt2")
    assert {key for key in first if edited[key] != first[key]} == {"scorer"}
    assert {key for key in first if other[key] != first[key]} == {"model", "reference"}


def test_a_run_that_a_step_has_stopped_may_go_on_without_such_steps(tmp_path: Path) -> None:
    settings = [f"model.name={save_tiny(tmp_path / 'tiny')}", "data.train=t.jsonl", "method=dpo"]
    first = run_identity(load_run(None, settings), [])
    skipping = ["optim={on_nonfinite: skip, max_skipped_in_a_row: 9}", "strategy.timeout_seconds=5"]
    kept = ["model.compile=true", "checkpoint={keep: 7, best: {metric: loss, mode: min}}"]
    assert run_identity(load_run(None, [*settings, *skipping, *kept]), []) == first
    assert run_identity(load_run(None, [*settings, "optim.lr=1e-3"]), []) != first


def test_the_best_checkpoint_is_one_of_those_that_are_measured() -> None:
    def best(*settings: str) -> BestConfig | None:
        run = load_run(None, ["model.name=m", "data={train: t.jsonl, eval: e.jsonl}", *settings])
        refuse_unsaved_best(run, 60)
        return run.checkpoint.best

    held_out = "checkpoint={every: 20, best: {metric: eval_loss, mode: min}}"
    assert best("method=dpo") is None
    assert best("method=dpo", "checkpoint.best={metric: rewards/margins, mode: max}") == BestConfig(
        metric="rewards/margins", mode="max"
    )
    expected = BestConfig(metric="eval_loss", mode="min")
    assert best("method=dpo", held_out, "evaluate.every=15") == expected  # what is evaluated is saved
    assert best("method=reward_model", held_out, "evaluate.every=10") == expected
    with pytest.raises(UserError, match="eval_loss is measured after steps 25, 50, 60, and checkpoint.every: 20 "):
        best("method=reward_model", held_out, "evaluate.every=25")


def ranked_store(folder: Path, rows: list[dict[str, object]], shape: Shape = "group") -> TokenStore:
    path = folder / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unit = Unit(path=str(path))
    chat, settings = make_chat(byte_level(template=CHATML)), TokenBudget(max_prompt_tokens=20, max_tokens=40)
    [chunk] = read_chunks(unit)
    report = prepare_rows([chunk], chat, settings, unit=unit, shape=shape, directory=folder / "store", name="0")
    assert report.shards and not report.bad
    return commit_store(folder / "store", report.shards, meta={})


WHOLE: dict[str, object] = {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2], "behavior_logps": [-1, -2]}
CUT = {**WHOLE, "completions": ["b", "c" * 99]}
NO_REWARDS = {key: value for key, value in WHOLE.items() if key != "rewards"}


@pytest.mark.parametrize(
    ("method", "rows", "lacking"),
    [
        ("{name: dpo_rw}", [WHOLE, CUT], ""),
        ("{name: dpo_rw}", [WHOLE, NO_REWARDS, NO_REWARDS], "`rewards`.* 2 of 3 rows lack it, first .*ranked.jsonl:2"),
        ("{name: dpo_rw}", [NO_REWARDS], "`rewards`.* 1 of 1 rows lack it, first .*ranked.jsonl:1"),
        ("{name: exo_rw}", [WHOLE, WHOLE], ""),
        ("{name: exo_rw}", [WHOLE, CUT], "`behavior_logps`.* 1 of 2 rows lack it, first .*ranked.jsonl:2"),
        ("{name: exo_rw, behavior: assume_reference}", [WHOLE, CUT], ""),
        ("{name: exo_rw, behavior_correction: 'off'}", [WHOLE, CUT], ""),
    ],
)
def test_rows_without_a_number_are_named_before_training(
    tmp_path: Path, method: str, rows: list[dict[str, object]], lacking: str
) -> None:
    run = load_run(None, ["model.name=m", "data.train=t.jsonl", f"method={method}"])
    store = ranked_store(tmp_path, rows)
    if not lacking:
        return require_columns(run, "ranked", store)
    with pytest.raises(UserError, match=f"ranked: {run.method.name} needs {lacking}"):
        require_columns(run, "ranked", store)


def test_labels_are_of_the_examples_not_of_their_mismatched_company(tmp_path: Path) -> None:
    run = load_run(None, ["model.name=m", "data.train=t.jsonl", "method.name=kto"])
    examples = Mismatched(ranked_store(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], shape="labelled"))
    shard = write_shard(tmp_path / "mismatched", "0", [examples[0], examples[1]])
    require_columns(run, "pairs", commit_store(tmp_path / "mismatched", [shard], meta={}))


SCORER = Path(__file__).parents[2] / "fixtures" / "scorers.py"
PPO = [
    *("data.train=t.jsonl", f"scorer={{name: rule, function: '{SCORER}:vowels'}}", "rollout.samples=1", "method=ppo"),
    *("data_policy=on_policy", "optim={lr: 1e-6, steps: 10, warmup: 2}"),
]


def test_a_critic_starts_from_the_policy_or_from_its_own_folder_and_has_a_rate_of_its_own(tmp_path: Path) -> None:
    policy, other = (save_tiny(tmp_path / name) for name in ("policy", "other"))
    null = load_run(None, [*PPO, f"model.name={policy}", "model.from_scratch=true", "seed=5"])
    spec = make_critic_spec(null)
    assert spec.model == replace(model_spec(null), head=ScalarHead()) and spec.model.config.from_scratch
    assert spec.optim == null.optim.model_copy(update={"lr": 9e-6})
    run = load_run(None, [*PPO, f"model.name={policy}", f"critic={{model: {other}, lr: 1e-4}}", "data.stop=<|end|>"])
    spec = make_critic_spec(run)
    assert spec.model.name == str(other) and spec.model.head == ScalarHead(stop="<|end|>")
    assert spec.optim == run.optim.model_copy(update={"lr": 1e-4})
    # Other weights of the critic are another run.
    before = run_identity(run, [])
    assert run_identity(run, []) == before
    without = load_run(None, [*PPO, f"model.name={policy}", "method=reinforce_pp"])
    assert "critic" not in run_identity(without, [])
    save_tiny(other, initializer_range=0.1)
    assert run_identity(run, [])["critic"] != before["critic"]


def test_a_critic_that_reads_other_tokens_is_refused(tmp_path: Path) -> None:
    policy, other = (save_tiny(tmp_path / name) for name in ("policy", "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = sorted(ids, key=ids.__getitem__)[40:42]
    ids[first], ids[second] = ids[second], ids[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"critic\.model: .*other reads other tokens than the policy: 2 of \d+ differ"):
        refuse_unusable_models(load_run(None, [*PPO, f"model.name={policy}", f"critic.model={other}"]))
    with pytest.raises(UserError, match=r"critic\.model: there is no directory .*nowhere"):
        refuse_unusable_models(load_run(None, [*PPO, f"model.name={policy}", f"critic.model={tmp_path / 'nowhere'}"]))
