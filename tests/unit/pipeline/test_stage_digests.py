"""The output of each stage, pinned. A digest that changes here changes what stored artifacts mean: raise that stage's
number in ``STAGE_VERSIONS`` together with the digest, so that nobody trains on what an older version made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab.world import pairs

from rayalign.config.candidates import Labelling
from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.config.policy import LabelConfig
from rayalign.config.scoring import RuleScorerConfig
from rayalign.data.chat import make_chat
from rayalign.data.group import Group
from rayalign.data.records import RawRow
from rayalign.data.select import rows_file, scores_of, select_best, write_selected_rows
from rayalign.data.shard import write_column_shard, write_shard
from rayalign.data.store import TokenStore, commit_columns, commit_store
from rayalign.data.tokenize_rows import Unit, prepare_rows
from rayalign.data.unpair import Mismatched
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.methods import resolve
from rayalign.rounds.chunk import ChunkMaker, ChunkSpec, PromptChunk
from rayalign.rounds.columns import RoundPreparation, prepare_columns
from rayalign.rounds.streams import StoredStream
from rayalign.run.reference import LOG_PROBS
from rayalign.storage.artifacts import STAGE_VERSIONS
from rayalign.storage.manifest import file_digest

LAB_MODEL = Path(__file__).parents[3] / "examples" / "lab" / "model"
PAIR_TOKENS = 610
PAIRS_DIGEST = "2d4d7be38e5f33bdc1a2d4925b9b2856e3488e39cfba7a0ad180256df88b297d"
MISMATCHED_DIGEST = "660ed767ef4fb58cea57a2076d4302ed6fb4e57261d2913d746854ca5b522fc3"
ROLLOUTS_DIGEST = "d58a95504aa70351f14f748d0a3fd32346215dd305a9165567b82e7459e39db5"
KEPT_DIGEST = "016ea80753a452098e1aca0455891159cedc5fb301b3dc2c8ce0167dbf916048"
FIRST_ADVANTAGES = [-1.612147, 0.1041002, 1.8203475]
REFERENCE_SUMS = [-363.333, -529.203, -397.2, -482.58, -443.572, -462.938, -483.505, -381.774]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("tokens"), "pair")


def make_store(directory: Path, shape: str) -> TokenStore:
    rows = [RawRow(source="pairs.jsonl", line=line, value=row) for line, row in enumerate(pairs(0, 8), start=1)]
    report = prepare_rows(
        [rows],
        make_chat(load_tokenizer(LAB_MODEL)),
        TokenBudget(max_prompt_tokens=128, max_tokens=256),
        unit=Unit(path="pairs.jsonl"),
        shape=shape,  # type: ignore[arg-type]
        directory=directory,
        name="00000-000000",
    )
    assert report.shards
    return commit_store(directory, report.shards, meta={})


def test_every_stage_is_pinned() -> None:
    assert STAGE_VERSIONS == {
        "rows": 1,
        "tokens": 4,
        "mismatched": 3,
        "reference": 1,
        "filter": 1,
        "rollouts": 4,
        "prepared": 1,
    }


def test_tokens(store: TokenStore) -> None:
    assert (len(store), int(store.index.whole().num_predicted.sum())) == (8, PAIR_TOKENS)
    assert store.digest == PAIRS_DIGEST


def test_mismatched(tmp_path: Path) -> None:
    labelled = make_store(tmp_path / "labelled", "labelled")
    view = Mismatched(labelled)
    shard = write_shard(tmp_path / "mismatched", "0", [view[index] for index in range(len(view))])
    assert commit_store(tmp_path / "mismatched", [shard], meta={}).digest == MISMATCHED_DIGEST


def test_reference(store: TokenStore) -> None:
    spec = ScoringSpec(
        model=ModelSpec(config=ModelConfig(name=str(LAB_MODEL), from_scratch=True), seed=0),
        tokens_per_micro_batch=2048,
        row_tokens=256,
    )
    columns = FrozenModel(spec, torch.device("cpu")).token_logps([store[index] for index in range(len(store))])
    sums = [float(column.sum(dtype=np.float64)) for column in columns]
    assert sums == pytest.approx(REFERENCE_SUMS, rel=1e-5)


def test_filter(store: TokenStore, tmp_path: Path) -> None:
    """Of log-probs that no mean rounds: eighths, −(1 + 5 · row mod 8)/8 at every token of a row."""
    columns = [
        np.full(num_predicted, -(1 + 5 * row % 8) / 8, np.float32)
        for row, num_predicted in enumerate(store.index.whole().num_predicted.tolist())
    ]
    shard = write_column_shard(tmp_path / "logps", "0", first=0, per_token={LOG_PROBS: columns})
    laid = commit_columns(tmp_path / "logps", store, [shard], meta={})
    selection = select_best([scores_of(laid, column=LOG_PROBS, own_candidates=None)], 0.7)
    assert (selection.threshold, selection.kept[0].tolist()) == (-3 / 8, [0, 2, 5])
    write_selected_rows(tmp_path / "filter", selection)
    assert file_digest(rows_file(tmp_path / "filter", 0)) == KEPT_DIGEST


def test_prepared(tmp_path: Path) -> None:
    """REINFORCE++'s advantages of groups of two; no model, so that nothing depends on rounding but one division."""
    groups = [
        replace(
            group,
            per_candidate={"reward": np.array([index % 3, 1], np.float32)},
            per_token={"behavior_token_logp": np.full(sum(c.num_predicted for c in group.candidates), -1, np.float32)},
        )
        for index, group in enumerate(make_groups(tmp_path / "pairs"))
    ]
    drawn = commit_store(tmp_path / "drawn", [write_shard(tmp_path / "drawn", "0", groups)], meta={})
    method = resolve("reinforce_pp")
    preparation = RoundPreparation(method=method, config=method.config(kl_coef=0), key="")
    made = prepare_columns(drawn, tmp_path / "prepared", preparation)
    advantages = np.concatenate([made[row].per_token["advantage"] for row in range(len(made))])
    assert (len(advantages), float(advantages.mean())) == (PAIR_TOKENS, pytest.approx(0, abs=1e-6))
    assert [float(made[row].per_token["advantage"][0]) for row in range(3)] == pytest.approx(FIRST_ADVANTAGES, rel=1e-5)


def make_groups(directory: Path) -> list[Group]:
    store = make_store(directory, "pair")
    return [store[row] for row in range(len(store))]


def test_rollouts(tmp_path: Path) -> None:
    """Of stored completions, scored and labelled again: what is drawn depends on rounding."""
    prompts = make_store(tmp_path / "prompts", "prompt")
    model = ModelSpec(config=ModelConfig(name=str(LAB_MODEL), from_scratch=True), seed=0)
    stream = StoredStream(
        name="prompts",
        stores=(tmp_path / "prompts",),
        columns=((),),
        weights=(1.0,),
        groups_per_step=1,
        num_candidates=2,
    )
    spec = ChunkSpec(
        prompts=stream,
        seed=0,
        policy=model,
        reference=ScoringSpec(model=model, tokens_per_micro_batch=2048, row_tokens=256),
        engine="none",
        sampling=None,
        keep_stored=True,
        labelling=Labelling(
            scorer=RuleScorerConfig(function="lab.world:oracle"), label=LabelConfig(name="bradley_terry", scale=0.1)
        ),
        shape="pair",
        needs_reference=False,
    )
    chunk = PromptChunk(name="0", positions=range(len(prompts)), directory=tmp_path / "rollouts", weights=None)
    report = ChunkMaker()((spec, chunk))
    assert commit_store(tmp_path / "rollouts", [report.shard], meta={}).digest == ROLLOUTS_DIGEST
