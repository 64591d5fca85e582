"""Cells of the quickstart without Ray: the filtered one reads the pairs that the same rule keeps in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab.in_process import CPU, Workshop, groups_of, scoring_spec
from lab.make_model import FOLDER
from lab.measure import cell_runs, comparison_of, quickstart
from lab.rl import REINFORCEMENT
from tiny_rollouts import SCORER

from rayalign.config.compare import started_from
from rayalign.config.model import ModelConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.engine.frozen import FrozenModel
from rayalign.engine.model.pretrained import ModelSpec, load_policy, save_pretrained
from rayalign.rounds.stored import drawn_rows
from rayalign.rounds.streams import StoredStream
from rayalign.storage.manifest import read_manifest


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The lab's model with weights, untrained."""
    folder = tmp_path_factory.mktemp("lab") / "model"
    save_pretrained(
        *load_policy(ModelSpec(config=ModelConfig(name=str(FOLDER), from_scratch=True)), device=CPU), folder
    )
    return str(folder)


def test_the_filtered_cell_is_dpo_on_the_likeliest_pairs(initial: str, tmp_path: Path) -> None:
    cells = cell_runs(quickstart())
    run, whole = (started_from(cells[name], initial) for name in ("dpo + filter 0.7", "dpo"))
    assert run.model_copy(update={"name": whole.name, "filter": None}) == whole
    [source] = run.data.train
    few = source.model_copy(update={"arguments": {**source.arguments, "n": 20}})
    data = run.data.model_copy(update={"train": (few,)})
    run, whole = (cell.model_copy(update={"data": data}) for cell in (run, whole))
    workshop = Workshop(folder=tmp_path)
    streams = [workshop.main_stream(cell, "pair", cell.name, scored=True)[0] for cell in (run, whole)]
    ours, all_of_them = [stream for stream in streams if isinstance(stream, StoredStream)]
    assert ours.stores == all_of_them.stores and drawn_rows(all_of_them) == (range(20),)

    groups = groups_of(run, few, "pair")
    scores = []
    for group, column in zip(groups, FrozenModel(scoring_spec(run), CPU).token_logps(groups), strict=True):
        length = group.candidates[0].num_predicted
        scores.append((column[:length].mean() + column[length:].mean()) / 2)
    likeliest = sorted(range(20), key=lambda row: -scores[row])[:6]
    assert drawn_rows(ours)[0].tolist() == sorted(likeliest)


@pytest.mark.parametrize("lag", [0, 1])
def test_reinforcement_learning_draws_its_rounds_in_this_process(initial: str, tmp_path: Path, lag: int) -> None:
    run = started_from(cell_runs(comparison_of(REINFORCEMENT))["rloo"], initial)
    [source] = run.data.train
    few = source.model_copy(update={"arguments": {**source.arguments, "n": 8}})
    update = {
        "data": run.data.model_copy(update={"train": (few,)}),
        "optim": run.optim.model_copy(update={"steps": 4, "groups_per_step": 2, "warmup": 0.0}),
        "rollout": run.rollout.model_copy(update={"max_new_tokens": 6}),
        "scorer": RuleScorerConfig(function=f"{SCORER}:vowels"),  # the oracle has one word for all that is no sentence
        "data_policy": run.data_policy.model_copy(update={"lag": lag}),
        "evaluate": None,
    }
    Workshop(folder=tmp_path).train(run.model_copy(update=update), "rloo")
    rounds = [read_manifest(folder)["meta"]["request"] for folder in (tmp_path / "rloo" / "rounds").glob("round_*")]
    assert sorted((drawn["number"], drawn["step"]) for drawn in rounds) == [(0, 0), (1, 2 - 2 * lag)]
    rows = [json.loads(row) for row in (tmp_path / "rloo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(0 <= row["reward"] <= 1 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
