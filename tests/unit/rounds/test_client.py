"""Which runs have a client of rounds, and that groups which are drawn are read through it alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_rollouts import OnPolicyRun
from tiny_runs import store, synthetic_groups

from rayalign.rounds.client import RoundsClient, client_of
from rayalign.rounds.plan import RoundPlan
from rayalign.rounds.source import StreamSource
from rayalign.rounds.streams import MixedStream, SourceSpec, StoredStream


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> StoredStream:
    return replace(store(tmp_path_factory.mktemp("pairs"), synthetic_groups([2] * 4)), name="other")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, model: Path, file: Path) -> SourceSpec:
    plan = RoundPlan(steps=4, refresh_every=2, lag=0, groups_per_step=4)
    return OnPolicyRun(tmp_path_factory.mktemp("run"), model, file, plan=plan).scenario.source


def test_stored_data_have_no_rounds(drawn: SourceSpec, pairs: StoredStream) -> None:
    """Also where stored groups stand in the place of fresh ones, as those that are drawn once do."""
    mixed = MixedStream(name="mixed", fresh=pairs, stored=pairs, fresh_fraction=0.5, groups_per_step=2)
    assert client_of(replace(drawn, streams=(pairs, mixed))) is None


def test_the_rounds_are_those_of_the_one_stream_that_is_drawn(drawn: SourceSpec, pairs: StoredStream) -> None:
    [main] = drawn.streams
    mixed = MixedStream(name="mixed", fresh=main, stored=pairs, fresh_fraction=0.5, groups_per_step=4)
    for streams in ((main,), (main, pairs), (pairs, mixed)):
        client = client_of(replace(drawn, streams=streams))
        assert client is not None and client.plan == main.plan
        assert StreamSource(replace(drawn, streams=streams), layout="packed", pad_id=0, rounds=client)


def test_two_streams_of_rounds_are_refused(drawn: SourceSpec) -> None:
    with pytest.raises(ValueError, match="draws the rounds of one stream, not of 2"):
        RoundsClient(replace(drawn, streams=drawn.streams * 2))


def test_rounds_without_a_client_are_refused(drawn: SourceSpec) -> None:
    with pytest.raises(
        ValueError, match="stream 'train' is drawn round by round, and there is no client of its rounds"
    ):
        StreamSource(drawn, layout="packed", pad_id=0)
