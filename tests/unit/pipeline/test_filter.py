"""The filter from log-probs to what is trained on: against a plain forward, through its stage, and after a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import CPU, Scenario, labelled, objective, save_tiny, store, synthetic_groups, train_alone, train_spec
from transformers import AutoModelForCausalLM

from rayalign.config import load_run
from rayalign.data.group import Group
from rayalign.data.select import read_selected_rows, rows_file
from rayalign.data.shard import write_column_shard
from rayalign.data.store import TokenStore, commit_columns
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.metrics import read_metrics
from rayalign.placement import Node
from rayalign.report.formatting import filter_sentence
from rayalign.rounds.stored import drawn_rows, opened_order
from rayalign.rounds.streams import StoredStream
from rayalign.run.reference import LOG_PROBS
from rayalign.run.stages import Stages, filter_facts
from rayalign.run.streams import keep_filtered as filtered_stream
from rayalign.runtime.session import Session
from rayalign.storage.artifacts import Artifacts

GROUPS = synthetic_groups([2] * 21, seed=5)
QUANTILE = 0.7
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("filter") / "model")


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    session = Session(started_here=True, nodes=(Node(id="", name="", cpus=1, gpus=0),))
    return Stages(artifacts=Artifacts(root=tmp_path / "artifacts", note=lambda line: None), session=session)


@pytest.fixture
def stream(model: Path, tmp_path: Path) -> StoredStream:
    """All pairs with their log-probs under the model, four a step."""
    return store(tmp_path / "pairs", GROUPS, reference=model, groups_per_step=4)


def filtered(stages: Stages, stream: StoredStream, quantile: float = QUANTILE) -> Path:
    log_probs = [columns[0] for columns in stream.columns]
    return stages.filtered(stream.stores, log_probs, quantile=quantile, own_candidates=None, unit="pairs")


@torch.no_grad()
def plain_scores(model: Path, groups: list[Group]) -> list[float]:
    """The definition again, one completion at a time through the whole of transformers."""
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    scores = []
    for group in groups:
        means = []
        for candidate in group.candidates:
            ids = torch.tensor([[*group.prompt_ids, *candidate.ids]])
            logp = policy(ids).logits[0].log_softmax(-1)
            answer = range(len(group.prompt_ids), ids.shape[1])
            own = [float(logp[at - 1, ids[0, at]]) for at, mask in zip(answer, candidate.mask, strict=True) if mask]
            means.append(sum(own) / len(own))
        scores.append(sum(means) / len(means))
    return scores


def test_what_is_kept_is_what_a_plain_forward_finds_likeliest(
    model: Path, stages: Stages, stream: StoredStream
) -> None:
    scores = plain_scores(model, GROUPS)
    likeliest = sorted(range(21), key=lambda row: -scores[row])[:7]  # ⌈0.3 · 21⌉
    gap = scores[likeliest[-1]] - sorted(scores)[21 - 8]
    assert gap > 1e-4  # or rounding might decide
    directory = filtered(stages, stream)
    assert read_selected_rows(rows_file(directory, 0)).tolist() == sorted(likeliest)
    facts = filter_facts(directory)
    threshold = facts.pop("threshold")
    assert facts == {"policy_logp_quantile": 0.7, "kept": 7, "of": 21, "unit": "pairs"}
    assert threshold == pytest.approx(scores[likeliest[-1]], abs=1e-5)
    assert filter_sentence(threshold=-1.2345, **facts) == "kept 7 of 21 pairs, threshold −1.23 nats per token"


def test_it_is_made_once_for_equal_log_probs(stages: Stages, stream: StoredStream, model: Path, tmp_path: Path) -> None:
    first = filtered(stages, stream)
    assert filtered(stages, stream) == first and len(stages.artifacts.made) == 1
    assert filtered(stages, stream, 0.5) != first
    other = store(tmp_path / "warm", GROUPS, reference=model, logit_temperature=2.0)
    assert TokenStore.open(other.stores[0]).digest == TokenStore.open(stream.stores[0]).digest
    assert filtered(stages, other) != first


def test_two_stores_are_held_to_one_threshold(stages: Stages, model: Path, tmp_path: Path) -> None:
    parts = [store(tmp_path / f"part_{n}", GROUPS[n::2], reference=model) for n in (0, 1)]
    both = replace(
        parts[0],
        stores=(*parts[0].stores, *parts[1].stores),
        columns=(*parts[0].columns, *parts[1].columns),
        weights=(1.0, 3.0),
    )
    directory = filtered(stages, both)
    rows = [2 * row + n for n in (0, 1) for row in read_selected_rows(rows_file(directory, n)).tolist()]
    scores = plain_scores(model, GROUPS)
    assert sorted(rows) == sorted(sorted(range(21), key=lambda row: -scores[row])[:7])


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone(Stages):
    """Scores in this process what otherwise a pool of actors does, and remembers which model was asked."""

    asked: list[ScoringSpec]

    def log_probs(self, store: Path, spec: ScoringSpec) -> Path:
        self.asked.append(spec)
        opened, directory = TokenStore.open(store), self.artifacts.root / f"scored-{len(self.asked)}"
        logps = FrozenModel(spec, CPU).token_logps([opened[row] for row in range(len(opened))])
        shard = write_column_shard(directory, "0", first=0, per_token={LOG_PROBS: logps})
        commit_columns(directory, opened, [shard], meta={})
        return directory


@pytest.mark.parametrize(("method", "unit", "own"), [("dpo", "pairs", 2), ("kto", "examples", 1)])
def test_a_run_is_filtered_by_its_initial_policy_at_temperature_1(
    model: Path, stages: Stages, tmp_path: Path, method: str, unit: str, own: int
) -> None:
    """Whatever the reference and the loss's temperature; of KTO's groups the mismatched completion does not count."""
    settings = [f"model={{name: {model}, reference: {tmp_path}/other}}", "data.train=t.jsonl", "strategy=single"]
    settings += [f"method={{name: {method}, logit_temperature: 2.0}}", "filter.policy_logp_quantile=0.7"]
    run, notes = load_run(None, settings), list[str]()
    groups = labelled(GROUPS) if method == "kto" else GROUPS
    whole = store(tmp_path / "store", groups, groups_per_step=4)
    alone = Alone(artifacts=Artifacts(root=tmp_path / "artifacts", note=notes.append), session=stages.session, asked=[])
    ours = filtered_stream(whole, run, alone)
    (spec,) = alone.asked
    assert (spec.model.name, spec.logit_temperature) == (str(model), 1.0)
    scores = plain_scores(model, [replace(group, candidates=group.candidates[:own]) for group in groups])
    num_kept = -(-3 * len(groups) // 10)
    likeliest = sorted(sorted(range(len(groups)), key=lambda row: -scores[row])[:num_kept])
    assert [rows.tolist() for rows in drawn_rows(ours) if not isinstance(rows, range)] == [likeliest]
    assert notes[-1].startswith(f"filter: kept {num_kept} of {len(groups)} {unit}, threshold −")
    assert replace(ours, kept=()) == whole
    unfiltered = run.model_copy(update={"filter": None})
    assert filtered_stream(whole, unfiltered, alone) == whole and len(alone.asked) == 1


def chosen(stages: Stages, stream: StoredStream) -> StoredStream:
    return replace(stream, kept=(rows_file(filtered(stages, stream), 0),))


def test_an_epoch_is_one_of_the_kept_pairs(stages: Stages, stream: StoredStream) -> None:
    ours = chosen(stages, stream)
    order = opened_order(ours, seed=0)
    assert (order.sizes, order.num_steps(1), order.num_steps(4)) == ((7,), 2, 7)
    assert opened_order(stream, seed=0).num_steps(1) == 6


class Interrupted(Exception):
    pass


def interrupt_after(step: int) -> Any:
    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == step:
            raise Interrupted

    return on_step


def test_training_on_a_filter_is_training_on_those_pairs_and_survives_a_restart(
    stages: Stages, stream: StoredStream, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seven pairs, kept by the filter or alone in a store, give the same weights; so does an interruption."""
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    ours = chosen(stages, stream)
    (rows,) = drawn_rows(ours)
    assert Counter(map(int, rows)).most_common(1)[0][1] == 1
    alone = store(tmp_path / "alone", [GROUPS[row] for row in rows], reference=model, groups_per_step=4)
    ends = {}
    for name, source, lost_after in (("whole", ours, 0), ("resumed", ours, 3), ("alone", alone, 0)):
        scenario = Scenario(model=model, streams=(source,), objectives=(objective("dpo"),), steps=STEPS)
        spec = train_spec(tmp_path / name, scenario, check_initial_logratio=True)
        if lost_after:
            with pytest.raises(Interrupted):
                train_alone(spec, scenario, on_step=interrupt_after(lost_after))
        final = train_alone(spec, scenario)
        steps = [(row["step"], row["loss"], row["epoch"]) for row in read_metrics(spec.directory / "metrics.jsonl")]
        ends[name] = (final / "model.safetensors").read_bytes(), steps
    assert ends["resumed"] == ends["whole"] and len(ends["whole"][1]) == STEPS
    assert ends["whole"][1][-1][2] == pytest.approx(STEPS * 4 / 7)
    # reference log-probs of fewer pairs are packed otherwise and differ in their last bits
    losses = {name: np.array([loss for _, loss, _ in steps]) for name, (_, steps) in ends.items()}
    np.testing.assert_allclose(losses["alone"], losses["whole"], rtol=0, atol=1e-5)
