"""Judging in an evaluation, without Ray: verdicts by sample, what was asked, what is missing, another baseline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import KEY, Endpoint, serving
from tiny_models import tiny
from tiny_runs import save_tiny
from tiny_tokenizers import LLAMA3, byte_level

from rayalign.comparison.evaluate import (
    Evaluation,
    answer_remarks,
    evaluation_digest,
    evaluation_spec,
    points_table,
    refuse_broken_scorers,
)
from rayalign.comparison.record import assumptions, judge_measure
from rayalign.config import load_compare, load_run
from rayalign.engine.model.pretrained import save_pretrained
from rayalign.errors import UserError
from rayalign.judge.evaluator import Evaluator
from rayalign.judge.measure import Measured
from rayalign.placement import Node
from rayalign.report.points import AnswerCounts, EvaluationPoint
from rayalign.run.stages import Stages
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

PROMPTS = ["Why?", "Who is it?", "What is the sky?", "And then?"]
SAMPLES = 3
RUN = """
model: {name: tiny}
data: {train: [pairs.jsonl], max_prompt_tokens: 64, max_tokens: 128}
method: {name: dpo}
evaluate:
  prompts: prompts.jsonl
  scorers: [{name: rule, function: "rewards.py:length"}]
  sampling: {samples: 3, max_new_tokens: 6}
"""
RULE = "evaluate.judge={name: rule, function: 'rewards.py:vowels'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    save_tiny(folder / "tiny")
    for name, spread in (("step_000002-abc", 0.4), ("other", 0.3), ("run/final", 0.3)):
        save_tiny(folder / name, initializer_range=spread)
        (folder / name / "MANIFEST.json").write_text(json.dumps({"name": name}))
    tokenizer = byte_level(template=LLAMA3)
    tokenizer.add_tokens(["another"])
    save_pretrained(tiny("llama", vocab_size=len(tokenizer)), tokenizer, folder / "stranger")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewards.py").write_text(
        "def length(prompt, reply):\n    return len(reply)\n\n\n"
        "def vowels(prompt, reply, letters='aeiou'):\n    return sum(letter in letters for letter in reply)\n"
    )
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as server:
        yield server


@dataclass
class InThisProcess:
    """Stands where a pool of one evaluator does."""

    evaluator: Evaluator
    called: int = 0

    def call(self, subject: Any) -> dict[str, Measured]:
        self.called += 1
        return self.evaluator(subject)


def evaluation_of(folder: Path, *settings: str) -> Evaluation:
    evaluated = load_run(folder / "run.yaml", settings).evaluated
    assert evaluated is not None
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    spec = evaluation_spec(evaluated, Stages(artifacts=Artifacts(root=folder / "artifacts"), session=session))
    pool: Any = InThisProcess(Evaluator(spec))
    return Evaluation(spec=spec, config=evaluated.evaluate, digest=evaluation_digest(spec), evaluators=pool)


def judge_at(endpoint: Endpoint, *, role: str = "judge") -> str:
    text = f"{{name: llm, model: m, base_url: '{endpoint.url}', api_key_env: TEST_KEY}}"
    return f"evaluate.judge={text}" if role == "judge" else f"evaluate.scorers=[{text}]"


def replies(evaluation: Evaluation, subject: Any) -> list[tuple[str, ...]]:
    return list(evaluation.evaluators.call(subject)["prompts"].replies)


def vowels(reply: str) -> int:
    return sum(letter in "aeiou" for letter in reply)


def test_every_sample_is_judged_against_the_references_of_the_same_number(folder: Path, tmp_path: Path) -> None:
    evaluation = evaluation_of(folder, RULE)
    checkpoint = folder / "step_000002-abc"
    (point,) = evaluation.points(checkpoint, tmp_path)
    mine, theirs = replies(evaluation, checkpoint), replies(evaluation, None)
    expected = [
        [(np.sign(vowels(a) - vowels(b)) + 1) / 2 for a, b in zip(row, other, strict=True)]
        for row, other in zip(mine, theirs, strict=True)
    ]
    assert point.verdicts is not None and [list(row) for row in point.verdicts] == expected
    assert len({value for row in expected for value in row}) == 3  # wins, ties and losses
    ties = sum(value == 0.5 for row in expected for value in row)
    assert point.answers == (AnswerCounts(role="judge", name="vowels", replies=12, calls=24, ties=ties),)


def test_the_reference_ties_with_itself_unasked(folder: Path, endpoint: Endpoint, tmp_path: Path) -> None:
    evaluation = evaluation_of(folder, judge_at(endpoint))
    (point,) = evaluation.points(None, tmp_path)
    assert point.verdicts == ((0.5,) * SAMPLES,) * len(PROMPTS)
    assert point.answers == () and endpoint.seen == []


def test_a_model_that_always_says_first_gives_a_half_everywhere(
    folder: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.answer = lambda question: "Verdict: A"
    evaluation = evaluation_of(folder, judge_at(endpoint))
    (point,) = evaluation.points(folder / "step_000002-abc", tmp_path)
    assert point.verdicts == ((0.5,) * SAMPLES,) * len(PROMPTS)
    (asked,) = point.answers
    assert asked.calls == len(endpoint.seen) == 2 * asked.disagreements
    assert asked.ties + asked.disagreements == asked.replies == 12 and asked.disagreements > 0
    assert KEY not in (tmp_path / "evaluation" / "step_000002.json").read_text()


def test_what_is_missing_is_counted_up_to_the_limit(folder: Path, endpoint: Endpoint, tmp_path: Path) -> None:
    """Every reply to one of four prompts stays without a rating: 3 of 12."""
    endpoint.answer = lambda question: "hm" if "Who is it?" in question else "Rating: 7"
    evaluation = evaluation_of(folder, judge_at(endpoint, role="scorer"), "evaluate.max_missing_fraction=0.25")
    (point,) = evaluation.points(None, tmp_path)
    assert point.scores["m"] == ((7.0,) * 3, (None,) * 3, (7.0,) * 3, (7.0,) * 3)
    (asked,) = point.answers
    assert (asked.role, asked.name, asked.replies, asked.missing) == ("scorer", "m", 12, 3)
    assert (asked.calls, asked.failures) == (9 + 3 * 4, 12)
    assert asked.problem.startswith(f"m at {endpoint.url}/chat/completions gave no verdict in 4 attempts")
    assert evaluation.points(None, tmp_path) == (point,) and len(endpoint.seen) == 21  # kept

    stricter = evaluation_of(folder, judge_at(endpoint, role="scorer"), "evaluate.max_missing_fraction=0.2")
    with pytest.raises(UserError, match="evaluation of prompts: the scorer m gave no answer for 3 of 12 replies, more "
                       rf"than evaluate.max_missing_fraction 0.2 allows; first: m at {endpoint.url}"):  # fmt: skip
        stricter.points(None, tmp_path)
    endpoint.answer = lambda question: "Rating: 6"
    assert stricter.points(None, tmp_path)[0].scores["m"] == ((6.0,) * 3,) * 4


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"the judge m gave no answer for \d+ of 12 replies.*first: m at http"),
        (503, r"judge: http.*gives no answer: .*the same command continues"),
    ],
)
def test_too_few_verdicts_keep_no_numbers(
    folder: Path, endpoint: Endpoint, tmp_path: Path, status: int, message: str
) -> None:
    endpoint.answer = lambda question: status
    evaluation = evaluation_of(folder, judge_at(endpoint))
    with pytest.raises(UserError, match=message) as found:
        evaluation.points(folder / "step_000002-abc", tmp_path)
    assert KEY not in str(found.value)
    assert not list(tmp_path.rglob("*.json"))


def test_what_a_function_fails_on_is_missing_too(folder: Path, tmp_path: Path) -> None:
    """The replies to one of four prompts are counted, and up to the limit they end nothing."""
    (folder / "picky.py").write_text(
        "def picky(prompt, reply):\n    print('asked')\n    return 1 / ('Who' not in prompt)\n"
    )
    settings = ["evaluate.scorers=[{name: rule, function: 'picky.py:picky'}]", "evaluate.max_missing_fraction=0.25"]
    evaluation = evaluation_of(folder, *settings)
    said: list[str] = []
    evaluation = replace(evaluation, note=said.append)
    (point,) = evaluation.points(None, tmp_path)
    assert point.scores["picky"] == ((1.0,) * 3, (None,) * 3, (1.0,) * 3, (1.0,) * 3)
    (asked,) = point.answers
    assert (asked.missing, asked.replies) == (3, 12) and "raised ZeroDivisionError" in asked.problem
    assert said == ["evaluation: picky.py:picky printed: asked"]
    with pytest.raises(UserError, match="the scorer picky gave no answer for 3 of 12 replies.*picky' raised ZeroDivis"):
        evaluation_of(folder, settings[0]).points(None, tmp_path)


def test_wins_against_another_run(folder: Path, tmp_path: Path) -> None:
    evaluation = evaluation_of(folder, RULE, f"evaluate.baseline={folder}/run")
    found = evaluation.baseline(tmp_path)
    assert found is not None
    assert found[0].verdicts == ((0.5,) * SAMPLES,) * len(PROMPTS)
    kl = np.array(found[0].kl["k1"])
    assert np.abs(kl).max() > 0.01  # it is no reference
    (reference,) = evaluation.points(None, tmp_path)
    assert evaluation.spec.baseline is not None
    mine, theirs = replies(evaluation, None), replies(evaluation, evaluation.spec.baseline)
    assert reference.verdicts is not None
    assert [list(row) for row in reference.verdicts] == [
        [(np.sign(vowels(a) - vowels(b)) + 1) / 2 for a, b in zip(row, other, strict=True)]
        for row, other in zip(mine, theirs, strict=True)
    ]
    assert np.abs(np.array(reference.kl["k1"])).max() == 0
    again = evaluation_of(folder, RULE, f"evaluate.baseline={folder}/run")
    assert again.baseline(tmp_path) == found
    assert again.evaluators.called == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [("./nowhere", "evaluate.baseline: .*there is no directory"), ("./stranger", "has another tokenizer than the ref")],
)
def test_a_baseline_that_cannot_be_compared_is_refused(folder: Path, baseline: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluation_of(folder, f"evaluate.baseline={baseline}")


def test_numbers_are_kept_until_judge_or_baseline_change(folder: Path) -> None:
    def digest(*settings: str) -> str:
        return evaluation_of(folder, *settings).digest

    settings = [[], [RULE], [RULE.replace("}", ", arguments: {letters: xyz}}")], ["evaluate.baseline=./other"]]
    assert len({digest(*given) for given in settings}) == len(settings)
    assert digest("evaluate.max_missing_fraction=0.5") == digest()


def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_trained(folder: Path) -> None:
    for setting, message in (
        (judge_text("api_key_env: NO_SUCH_KEY"), "judge.api_key_env: NO_SUCH_KEY is not set"),
        ("evaluate.judge={name: rule, function: 'rewards.py:lenght'}", "has no 'lenght'"),
        ("evaluate.baseline=./nowhere", "evaluate.baseline"),
    ):
        run = load_run(folder / "run.yaml", [setting])
        assert run.evaluate is not None
        with pytest.raises(UserError, match=message):
            refuse_broken_scorers(run.evaluate)


def judge_text(more: str) -> str:
    return f"evaluate.judge={{name: llm, model: m, base_url: 'http://h', {more}}}"


def test_the_table_has_the_judges_win_rate_and_says_what_was_asked(folder: Path) -> None:
    run = load_run(folder / "run.yaml", [RULE])
    assert run.evaluate is not None
    table = ((1.0,), (0.5,), (1.0,), (None,))
    point = EvaluationPoint(
        prompt_set="prompts",
        step=2,
        scores={"length": table},
        kl={"kl_rb": table, "k1": table},
        length=table,
        finished=table,
        verdicts=table,
        answers=(AnswerCounts(role="judge", name="vowels", replies=4, missing=1, calls=8, failures=1, ties=1),),
    )
    shown = points_table(run.evaluate, {"2": (point,)})
    (column,) = [column for column in shown.columns if column.header == "win rate, judged by vowels"]
    assert list(column.cells)[0].startswith("0.833 [")
    assert list(answer_remarks({"2": (point,)})) == [
        "step 2, prompts: judge vowels: 4 replies, 8 calls, 1 failures, 1 ties, 0 disagreements, 1 missing"
    ]


@pytest.mark.parametrize(
    ("scorer", "evaluate", "uses"),
    [
        ("{name: rule, function: 'rewards.py:length'}", "judge: null", ["is shown here as a result"]),
        ("{name: rule, function: 'rewards.py:length', unit: m}", "judge: null", ["is shown here as a result"]),
        ("{name: rule, function: 'rewards.py:vowels'}", "judge: null", []),
        ("{name: rule, function: 'rewards.py:vowels'}", "judge: {name: rule, function: 'rewards.py:vowels'}",
         ["decides wins here"]),
        ("{name: rule, function: 'rewards.py:vowels', arguments: {letters: xyz}}",
         "judge: {name: rule, function: 'rewards.py:vowels'}", []),
        ("{name: rule, function: 'rewards.py:length'}", "judge: {name: rule, function: 'rewards.py:length'}",
         ["is shown here as a result", "decides wins here"]),
        ("{name: llm, model: m, base_url: 'http://h', template: '{{ reply }}?'}",
         "judge: {name: llm, model: m, base_url: 'http://h'}", ["decides wins here"]),
        ("{name: llm, model: m, base_url: 'http://h'}", "judge: {name: llm, model: n, base_url: 'http://h'}", []),
    ],
)  # fmt: skip
def test_the_report_says_where_the_trainers_scorer_is_a_result_too(
    folder: Path, tmp_path: Path, scorer: str, evaluate: str, uses: list[str]
) -> None:
    path = folder / f"compare-{tmp_path.name}.yaml"
    block = RUN.replace("\n", "\n  ").replace("\n    sampling", f"\n    {evaluate}\n    sampling")
    path.write_text(
        f"base:{block}\n  data_policy: on_policy\n  rollout: {{samples: 2}}\n  scorer: {scorer}\n"
        "grid: {data_policy: [off_policy, on_policy]}\n"
    )
    name = scorer.partition("py:")[2].partition("'")[0] or "m"
    assert assumptions(load_compare(path)) == [
        f"{name} scored completions that on_policy trained on, and {use} as well: a gain under it alone says little."
        for use in uses
    ]


def test_a_judge_is_explained(folder: Path) -> None:
    rule = load_run(folder / "run.yaml", [RULE.replace("}", ", description: Counts vowels.}")])
    asked = load_run(folder / "run.yaml", [judge_text("api_key_env: KEY")])
    for run, words in ((rule, "Counts vowels. As judge: the reply with the higher score wins"), (asked, "both orders")):
        assert run.evaluate is not None and run.evaluate.judge is not None
        assert words in judge_measure(run.evaluate.judge).description
