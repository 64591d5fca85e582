"""The token store: what is written is what is read, and what is damaged is refused by name."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.data.group import Candidate, Group
from rayalign.data.micro_batches import PlanError, check_budget
from rayalign.data.pack import group_lengths
from rayalign.data.shard import finished_shards, write_column_shard, write_shard
from rayalign.data.store import StoreMismatch, TokenStore, commit_columns, commit_store
from rayalign.storage.manifest import MANIFEST, TornDirectory

REWARDS = (0.25, float("nan"), -3.0)


def make_group(line: int, sizes: tuple[int, ...] = (3, 5), columns: bool = True) -> Group:
    random = np.random.default_rng(line)
    candidates = tuple(
        Candidate(
            ids=random.integers(0, 50_000, size).astype(np.int32),
            mask=np.r_[random.random(size - 1) < 0.7, True],
            finished=bool(random.random() < 0.5),
        )
        for size in sizes
    )
    predicted = sum(candidate.num_predicted for candidate in candidates)
    return Group(
        prompt_ids=random.integers(0, 50_000, 4 + line % 3).astype(np.int32),
        candidates=candidates,
        per_candidate={"reward": np.array(REWARDS[: len(sizes)], np.float32)} if columns else {},
        per_token={"behavior_token_logp": random.normal(size=predicted).astype(np.float32)} if columns else {},
        source=f"part{line % 2}.jsonl",
        line=line,
    )


def assert_equal(found: Group, expected: Group) -> None:
    assert (found.source, found.line) == (expected.source, expected.line)
    np.testing.assert_array_equal(found.prompt_ids, expected.prompt_ids)
    for a, b in zip(found.candidates, expected.candidates, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.finished == b.finished
        assert (a.ids.dtype, a.mask.dtype) == (np.int32, np.bool_)
    for ours, theirs in ((found.per_candidate, expected.per_candidate), (found.per_token, expected.per_token)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == np.float32


@pytest.fixture
def groups() -> list[Group]:
    return [make_group(line, sizes) for line, sizes in enumerate([(3, 5), (1,), (2, 2, 7), (4, 1), (6, 6)], start=1)]


@pytest.fixture
def store(tmp_path: Path, groups: list[Group]) -> TokenStore:
    return write_store(tmp_path / "store", groups)


APART = 1
"""A size of shards at which none are joined."""


def write_store(directory: Path, groups: list[Group], *, names: tuple[str, str] = ("a", "b")) -> TokenStore:
    shards = [write_shard(directory, names[0], groups[:2]), write_shard(directory, names[1], groups[2:])]
    return commit_store(directory, shards, meta={"tokenizer": "tiny"}, shard_bytes=APART)


def test_groups_come_back_as_they_were_written(store, groups):
    assert len(store) == 5
    assert store.meta == {"tokenizer": "tiny"}
    for index, group in enumerate(groups):
        assert_equal(store[index], group)
        assert store.lengths(index) == group_lengths(group)
    index = store.index.whole()
    assert index.num_candidates.tolist() == [2, 1, 3, 2, 2]
    assert index.prompt_tokens.tolist() == [len(g.prompt_ids) for g in groups]
    assert index.packed_tokens.tolist() == [group_lengths(g).packed for g in groups]
    assert index.num_predicted.tolist() == [sum(group_lengths(g).predicted) for g in groups]
    assert index.longest.tolist() == [len(g.prompt_ids) + max(group_lengths(g).candidates) for g in groups]
    assert store.index.name(2) == "part1.jsonl:3"
    assert store.column_names == {"reward", "behavior_token_logp"}
    with pytest.raises(IndexError, match="group 5 is outside a store of 5"):
        store[5]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=12), st.integers(0, 12))
def test_any_groups_round_trip(tmp_path_factory, sizes, cut):
    groups = [make_group(line, tuple(own)) for line, own in enumerate(sizes)]
    directory = tmp_path_factory.mktemp("store")
    shards = [write_shard(directory, "a", groups[:cut]), write_shard(directory, "b", groups[cut:])]
    store = commit_store(directory, shards, meta={})
    assert len(store) == len(groups)
    for index, group in enumerate(groups):
        assert_equal(store[index], group)


def test_a_column_that_only_some_groups_have_is_missing_elsewhere(tmp_path):
    bare = make_group(2, columns=False)
    store = commit_store(tmp_path, [write_shard(tmp_path, "a", [make_group(1), bare])], meta={})
    assert np.isnan(store[1].per_candidate["reward"]).tolist() == [True, True]
    assert np.isnan(store[1].per_token["behavior_token_logp"]).all()

    mixed = [write_shard(tmp_path / "mixed", "a", [make_group(1)]), write_shard(tmp_path / "mixed", "b", [bare])]
    assert commit_store(tmp_path / "mixed", mixed, meta={}).column_names == set()


def test_digest_depends_on_content_alone(tmp_path, groups):
    first = write_store(tmp_path / "here", groups)
    renamed = write_store(tmp_path / "there", groups, names=("x", "y"))
    assert first.digest == renamed.digest
    assert write_store(tmp_path / "other", [*groups[:4], make_group(9)]).digest != first.digest


def test_reading_counts_only_what_it_touches(store):
    index = store.index.whole()
    words = [int(index.packed_tokens[i]) + 1 for i in (0, 3)]
    columns = [int(index.num_candidates[i] + index.num_predicted[i]) + 1 for i in (0, 3)]
    assert store.nbytes([0, 3]) == 4 * (sum(words) + sum(columns))
    assert store.bytes_read == 0
    store[0], store[3]
    assert store.bytes_read == store.nbytes([0, 3])


def write_part(directory: Path, name: str, lines: range) -> None:
    write_shard(directory, name, [make_group(line) for line in lines])


def test_shards_are_written_by_independent_processes_and_survive_an_interruption(tmp_path):
    context = multiprocessing.get_context("fork")
    parts = {f"{i:02d}": range(10 * i, 10 * i + 10) for i in range(3)}
    writers = [context.Process(target=write_part, args=(tmp_path, name, lines)) for name, lines in parts.items()]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert list(finished_shards(tmp_path)) == ["00", "01", "02"]

    (tmp_path / "01.shard.json").unlink()  # killed before the shard's last write
    (tmp_path / "02.tokens").write_bytes(b"cut short")
    assert list(finished_shards(tmp_path)) == ["00"]

    for name in ("01", "02"):
        write_part(tmp_path, name, parts[name])
    store = commit_store(tmp_path, list(finished_shards(tmp_path).values()), meta={})
    assert [store[i].line for i in range(30)] == list(range(30))


def test_a_commit_needs_every_shard(tmp_path, groups):
    shard = write_shard(tmp_path, "a", groups)
    (tmp_path / "a.tokens").write_bytes(b"")
    with pytest.raises(TornDirectory, match="shard 'a' is not complete"):
        commit_store(tmp_path, [shard], meta={})
    assert not (tmp_path / MANIFEST).exists()


def test_an_uncommitted_store_is_refused(tmp_path, groups):
    write_shard(tmp_path, "a", groups)
    with pytest.raises(TornDirectory, match="never committed"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("file", ["groups.index", "b.tokens", "b.columns"])
def test_torn_files_are_named(store, tmp_path, file):
    path = tmp_path / "store" / file
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(TornDirectory, match=file):
        TokenStore.open(tmp_path / "store")
    path.unlink()
    with pytest.raises(TornDirectory, match=f"{file} is missing"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("file", ["b.tokens", "b.columns"])
def test_a_flipped_bit_is_found_on_opening_with_verify_and_on_reading_without(store, tmp_path, file):
    path = tmp_path / "store" / file
    data = bytearray(path.read_bytes())
    data[0] ^= 4  # in the first record of the second shard: group 2
    path.write_bytes(data)
    with pytest.raises(TornDirectory, match=file):
        TokenStore.open(tmp_path / "store", verify=True)
    opened = TokenStore.open(tmp_path / "store")
    assert opened[0].line == 1
    with pytest.raises(TornDirectory, match=f"{file}: the record of group 2"):
        opened[2]


def reference_columns(store: TokenStore) -> list[np.ndarray]:
    return [np.arange(n, dtype=np.float32) - 100 * i for i, n in enumerate(store.index.whole().num_predicted)]


def test_columns_are_laid_over_a_store(store, groups, tmp_path):
    columns = reference_columns(store)
    late = write_column_shard(tmp_path / "ref", "late", first=3, per_token={"ref_token_logp": columns[3:]})
    early = write_column_shard(tmp_path / "ref", "early", first=0, per_token={"ref_token_logp": columns[:3]})
    scored = commit_columns(tmp_path / "ref", store, [late, early], meta={"model": "tiny"})

    for opened in (scored, TokenStore.open(tmp_path / "store").with_columns(tmp_path / "ref", verify=True)):
        assert opened.digest == store.digest
        assert opened.column_names == {"reward", "behavior_token_logp", "ref_token_logp"}
        for index, group in enumerate(groups):
            np.testing.assert_array_equal(opened[index].per_token["ref_token_logp"], columns[index])
            np.testing.assert_array_equal(
                opened[index].per_token["behavior_token_logp"], group.per_token["behavior_token_logp"]
            )
    assert "ref_token_logp" not in store[0].per_token


def test_a_later_column_replaces_an_earlier_one(store, tmp_path):
    rewards = [np.full(k, 7, np.float32) for k in store.index.whole().num_candidates]
    shard = write_column_shard(tmp_path / "again", "all", first=0, per_candidate={"reward": rewards})
    assert commit_columns(tmp_path / "again", store, [shard], meta={})[2].per_candidate["reward"].tolist() == [7, 7, 7]


def test_columns_of_another_store_are_refused(store, tmp_path):
    other = write_store(tmp_path / "other", [make_group(line) for line in range(5)])
    columns = reference_columns(store)
    shard = write_column_shard(tmp_path / "ref", "all", first=0, per_token={"ref_token_logp": columns})
    commit_columns(tmp_path / "ref", store, [shard], meta={})
    with pytest.raises(StoreMismatch, match=f"was made for store {store.digest}, not for {other.digest}"):
        other.with_columns(tmp_path / "ref")


def test_columns_must_fit_the_store(store, tmp_path):
    columns = reference_columns(store)

    def shard(name: str, first: int, arrays: list[np.ndarray]):
        return write_column_shard(tmp_path / "ref", name, first=first, per_token={"ref_token_logp": arrays})

    head, tail = shard("head", 0, columns[:2]), shard("tail", 3, columns[3:])
    with pytest.raises(StoreMismatch, match="'tail' begins at group 3, not at 2"):
        commit_columns(tmp_path / "ref", store, [head, tail], meta={})
    with pytest.raises(StoreMismatch, match="cover 2 groups of a store of 5"):
        commit_columns(tmp_path / "ref", store, [head], meta={})
    wrong = shard("wrong", 0, [*columns[:4], columns[4][:-1]])
    with pytest.raises(TornDirectory, match="wrong.columns has .* bytes, its index says"):
        commit_columns(tmp_path / "ref", store, [wrong], meta={})
    assert not (tmp_path / "ref" / MANIFEST).exists()


def test_a_group_above_the_budget_is_named_before_the_first_step(store, groups):
    # Prompts of 5, 6, 4, 5 and 6 tokens: packed 13, 7, 15, 10 and 18; concatenated (R · L) 20, 7, 33, 18 and 24.
    arguments = {"row_tokens": None}
    check_budget(store, tokens_per_micro_batch=18, layout="packed", **arguments)
    with pytest.raises(PlanError, match="part1.jsonl:3 takes 33 tokens .* raise it to at least 33"):
        check_budget(store, tokens_per_micro_batch=32, layout="concatenated", **arguments)
    with pytest.raises(PlanError, match="4 groups are too large; this is the largest"):
        check_budget(store, tokens_per_micro_batch=8, layout="packed", **arguments)


def test_a_malformed_group_is_not_stored(tmp_path):
    bad = Group(prompt_ids=np.empty(0, np.int32), candidates=make_group(1).candidates, source="pairs.jsonl", line=3)
    with pytest.raises(ValueError, match="pairs.jsonl:3: the prompt has no token"):
        write_shard(tmp_path, "a", [bad])
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_plain_json(store, tmp_path):
    manifest = json.loads((tmp_path / "store" / MANIFEST).read_text())
    assert [shard["first"] for shard in manifest["shards"]] == [0, 2]
    assert manifest["files"]["a.tokens"] == manifest["shards"][0]["files"]["a.tokens"]
