"""What an evaluation depends on, and which cells may be measured together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import save_tiny

from rayalign.comparison.compare import common_evaluation
from rayalign.comparison.evaluate import evaluation_digest, evaluation_spec, instrument_digests, refuse_broken_scorers
from rayalign.comparison.record import assumptions, entry_labels
from rayalign.config import load_compare, load_run
from rayalign.errors import UserError
from rayalign.judge.evaluator import EvaluationSpec
from rayalign.placement import Node
from rayalign.run.job import evaluation_steps, refuse_long_warmup
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

RUN = """
model: {name: tiny}
data: {train: [pairs.jsonl], max_prompt_tokens: 64, max_tokens: 128}
method: {name: dpo}
evaluate:
  prompts: prompts.jsonl
  scorers: [{name: rule, function: "rewards.py:length"}]
  sampling: {samples: 1, max_new_tokens: 4}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny")
    save_tiny(tmp_path / "other")
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Why?"}) + "\n")
    (tmp_path / "rewards.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def spec_of(folder: Path, *settings: str) -> EvaluationSpec:
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    stages = Stages(artifacts=Artifacts(root=folder / "artifacts"), session=session)
    evaluated = load_run(folder / "run.yaml", settings).evaluated
    assert evaluated is not None
    return evaluation_spec(evaluated, stages)


def test_kl_is_measured_at_temperature_1_whatever_the_loss_divides_by(folder: Path) -> None:
    assert spec_of(folder, "method.logit_temperature=0.5").reference.logit_temperature == 1.0


def test_numbers_are_kept_until_what_they_depend_on_changes(folder: Path) -> None:
    first = evaluation_digest(spec_of(folder))
    assert evaluation_digest(spec_of(folder, "evaluate.every=7", "optim.lr=1e-3")) == first
    changed = {first}
    for settings in (
        ["data.max_prompt_tokens=3"],
        ["evaluate.sampling.samples=2"],
        ["seed=1"],
        ["model.dtype=bfloat16"],
    ):
        changed.add(evaluation_digest(spec_of(folder, *settings)))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Who?"}) + "\n")
    changed.add(evaluation_digest(spec_of(folder)))
    (folder / "rewards.py").write_text("def length(prompt, reply):\n    return -len(reply)\n")
    changed.add(evaluation_digest(spec_of(folder)))
    assert len(changed) == 7


def test_what_differs_between_two_measurements_is_named(folder: Path) -> None:
    first = instrument_digests(spec_of(folder))

    def changed(*settings: str) -> list[str]:
        return [key for key, digest in instrument_digests(spec_of(folder, *settings)).items() if digest != first[key]]

    assert changed("evaluate.every=7", "optim.lr=1e-3", "method=ipo") == []
    assert changed("seed=1") == ["sampling"]
    assert changed("model.dtype=bfloat16") == ["reference"]
    assert changed("data.max_prompt_tokens=3") == ["prompts"]
    (folder / "rewards.py").write_text("def length(prompt, reply):\n    return -len(reply)\n")
    assert changed() == ["scorers"]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("{name: rule, function: 'rewards.py:lenght'}", "has no 'lenght'"),
        ("{name: rule, function: 'absent.py:length'}", "there is no file"),
        ("{name: rule, function: 'rewards.py:length', arguments: {scale: 2}}", "unexpected keyword argument 'scale'"),
    ],
)
def test_a_scorer_that_cannot_be_called_is_refused_before_anything_is_trained(
    folder: Path, scorer: str, message: str
) -> None:
    run = load_run(folder / "run.yaml", [f"evaluate.scorers=[{scorer}]"])
    assert run.evaluate is not None
    with pytest.raises(UserError, match=message):
        refuse_broken_scorers(run.evaluate)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{model.name: [./tiny, ./other]}", "model.name is .*/other, and measured.*/tiny"),
        ("{model: [{name: ./tiny, as: a}, {name: ./tiny, reference: ./other, as: b}]}", "model.reference is"),
        ("{data.max_prompt_tokens: [32, 64]}", "data.max_prompt_tokens is 64"),
        ("{seed: [0, 1]}", "model.from_scratch draws another reference for every seed"),
    ],
)
def test_cells_that_are_measured_otherwise_are_not_compared(folder: Path, grid: str, message: str) -> None:
    path = folder / "compare.yaml"
    path.write_text("name: measured\nbase: run.yaml\ngrid: {method: [dpo, ipo]}\n")
    common_evaluation(load_compare(path))
    scratch = ["base.model.from_scratch=true"] if "seed" in grid else []
    with pytest.raises(UserError, match=message):
        common_evaluation(load_compare(path, [f"grid={grid}", *scratch]))


def test_steps_that_an_epoch_does_not_reach(folder: Path) -> None:
    run = load_run(folder / "run.yaml", ["optim.epochs=1", "evaluate.at=[2, 5]", "optim.warmup=9"])
    assert evaluation_steps(run, 5) == (2, 5)
    with pytest.raises(UserError, match="evaluate.at: step 5 is never reached: the run has 4"):
        evaluation_steps(run, 4)
    refuse_long_warmup(run.optim, 9)
    with pytest.raises(UserError, match="optim.warmup of 9 steps is longer than the run of 8"):
        refuse_long_warmup(run.optim, 8)


def test_the_report_repeats_what_a_cell_assumes(folder: Path) -> None:
    path = folder / "compare.yaml"
    path.write_text(
        "base: run.yaml\ngrid: {method: [dpo_rw, {name: exo_rw, as: exo, behavior: assume_reference}, exo_rw]}\n"
    )
    sentence = "exo: completions without behavior log-probabilities count as drawn from the reference."
    assert assumptions(load_compare(path)) == [sentence]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("{method: [dpo, ipo], seed: [0, 1]}",
         {"dpo__seed-0": "dpo", "dpo__seed-1": "dpo", "ipo__seed-0": "ipo", "ipo__seed-1": "ipo"}),
        ("{seed: [0, 1]}", {"seed-0": "dpo", "seed-1": "dpo"}),
        ("{method: [{name: dpo, seed: 4, as: a}, {name: dpo, seed: 5, as: b}, {name: dpo, beta: 0.5, seed: 6, as: c}]}",
         {"a": "a (all seeds)", "b": "a (all seeds)"}),
        ("{method: [{name: dpo, as: a}, {name: dpo, as: b}]}", {}),
        ("{method: [dpo, ipo]}", {}),
    ],
)  # fmt: skip
def test_cells_that_differ_in_their_seed_only_are_one_entry(folder: Path, grid: str, expected: dict[str, str]) -> None:
    path = folder / "compare.yaml"
    path.write_text(f"base: run.yaml\ngrid: {grid}\n")
    assert entry_labels(load_compare(path).cells) == expected
