"""Orders and streams: every row exactly as often as the plan says, from the position alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayalign.data.stream import Stream, WindowedOrder, hybrid_positions, order
from rayalign.errors import UserError


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000])
def test_order_is_a_bijection(n):
    permutation = order(3, "pairs", 1, n)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


@settings(deadline=None)
@given(st.integers(), st.text(max_size=5), st.integers(0, 9), st.integers(1, 300))
def test_order_is_a_bijection_for_every_key(seed, stream, epoch, n):
    permutation = order(seed, stream, epoch, n)
    assert {permutation(i) for i in range(n)} == set(range(n))


def test_order_reaches_far_without_memory():
    permutation = order(0, "pairs", 0, 10**15)
    rows = [permutation(i) for i in range(1000)]
    assert len(set(rows)) == 1000 and max(rows) < 10**15
    assert sum(row < 5 * 10**14 for row in rows) == pytest.approx(500, abs=60)


def test_order_is_the_same_on_every_machine():
    assert [order(0, "pairs", 0, 10)(i) for i in range(10)] == [6, 2, 0, 7, 9, 8, 5, 1, 3, 4]


def test_order_depends_on_seed_stream_and_epoch():
    keys = [(0, "pairs", 0), (1, "pairs", 0), (0, "prompts", 0), (0, "pairs", 1)]
    orders = {tuple(order(*key, 50)(i) for i in range(50)) for key in keys}
    assert len(orders) == 4


def test_every_row_comes_first_equally_often():
    # 3,000 keys, 6 rows: each (position, row) cell expects 500 ± 20; 5 standard deviations.
    cells: Counter[tuple[int, int]] = Counter()
    for seed in range(3000):
        permutation = order(seed, "pairs", 0, 6)
        cells.update((i, permutation(i)) for i in range(6))
    assert all(abs(count - 500) < 102 for count in cells.values()) and len(cells) == 36


def test_order_refuses_an_index_outside():
    with pytest.raises(IndexError, match="7 is outside"):
        order(0, "pairs", 0, 7)(7)


def stream(sizes=(10,), weights=(1.0,), groups_per_step=4, seed=0) -> Stream:
    return Stream(name="pairs", sizes=sizes, weights=weights, groups_per_step=groups_per_step, seed=seed)


def test_a_step_straddles_epochs_and_is_never_short():
    pairs = stream()
    rows = [[pairs.row(p)[1] for p in pairs.positions(step)] for step in range(5)]
    assert [len(step) for step in rows] == [4] * 5
    flat = sum(rows, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert pairs.epoch(10) == 1.0 and pairs.epoch(25) == 2.5


def test_a_step_is_a_function_of_its_number_alone():
    assert stream().positions(1000) == range(4000, 4004)
    late, again = stream(), stream()
    for position in range(500):
        again.row(position)
    assert [late.row(p) for p in late.positions(200)] == [again.row(p) for p in again.positions(200)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.3, 3.0)), min_size=1, max_size=4).filter(
        lambda sources: all(round(n * w) > 0 for n, w in sources)
    ),
    st.integers(0, 5),
)
def test_mixture_is_exact_per_epoch_and_fair_within_a_source(sources, seed):
    sizes, weights = zip(*sources, strict=True)
    mixture = stream(sizes=sizes, weights=weights, seed=seed)
    epoch = mixture.groups_per_epoch
    assert epoch == sum(round(n * w) for n, w in sources)
    seen: dict[int, Counter[int]] = {source: Counter({row: 0 for row in range(n)}) for source, n in enumerate(sizes)}
    for position in range(4 * epoch):
        source, row = mixture.row(position)
        seen[source][row] += 1
        assert max(seen[source].values()) - min(seen[source].values()) <= 1  # all rows before any again
        if (position + 1) % epoch == 0:
            epochs = (position + 1) // epoch
            assert [sum(seen[s].values()) for s in seen] == [epochs * round(n * w) for n, w in sources]


def test_every_step_holds_the_mixture():
    mixture = stream(sizes=(300, 100), weights=(1.0, 1.0), groups_per_step=8)
    for step in range(50):
        assert Counter(mixture.row(p)[0] for p in mixture.positions(step)) == {0: 6, 1: 2}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (3, 8), (0.5, 2), (2, 5), (0.1 + 0.2, 1)])
def test_number_of_steps(epochs, steps):
    assert stream().num_steps(epochs) == steps


def test_a_source_without_a_draw_is_refused():
    with pytest.raises(UserError, match="source 1 has 4 rows and weight 0.1, so it is never drawn"):
        stream(sizes=(10, 4), weights=(1.0, 0.1))
    with pytest.raises(UserError, match="no source"):
        stream(sizes=(), weights=())
    with pytest.raises(UserError, match="stream 'pairs' has no row"):
        stream(sizes=(0, 0), weights=(1.0, 1.0))


@pytest.mark.parametrize("sizes", [(0, 6, 4), (6, 0, 4), (6, 4, 0), (0, 10, 0)])
def test_a_source_that_a_filter_has_emptied_is_passed_over(sizes):
    mixture = stream(sizes=sizes, weights=(1.0, 1.0, 1.0))
    for epoch in range(3):
        drawn = Counter(mixture.row(position) for position in range(10 * epoch, 10 * epoch + 10))
        assert drawn == {(source, row): 1 for source, size in enumerate(sizes) for row in range(size)}


def test_hybrid_takes_its_share_of_fresh_groups():
    steps = [hybrid_positions(s, groups_per_step=4, fresh_fraction=0.3) for s in range(10)]
    assert [len(fresh) for fresh, _ in steps] == [1, 1, 1, 1, 2, 1, 1, 1, 1, 2]  # ⌊1.2(s+1)⌋ − ⌊1.2s⌋
    assert [len(fresh) + len(stored) for fresh, stored in steps] == [4] * 10
    for kind, total in ((0, 12), (1, 28)):
        assert [p for step in steps for p in step[kind]] == list(range(total))


def test_hybrid_does_not_round_away_a_decimal_fraction():
    # 0.7 · 10 is 7.000000000000001 or 6.999999999999999 in floating point, depending on the order of multiplication.
    for fraction in (0.1, 0.3, 0.7, 1 / 3):
        fresh, _ = hybrid_positions(2999, groups_per_step=10, fresh_fraction=fraction)
        assert fresh.stop == round(30_000 * fraction)


def test_a_windowed_order_visits_every_row_once_and_few_shards_at_a_time() -> None:
    parts, window = (7, 3, 12, 5, 9, 1, 4), 2
    ordered = WindowedOrder(3, "pairs/0", parts, window)
    shard_of = np.repeat(np.arange(len(parts)), parts)
    visited = [[ordered(epoch, index) for index in range(sum(parts))] for epoch in (0, 1)]
    for rows in visited:
        assert sorted(rows) == list(range(sum(parts)))
        seen = list(dict.fromkeys(shard_of[rows].tolist()))
        windows = [set(seen[first : first + window]) for first in range(0, len(seen), window)]
        sizes = [sum(parts[shard] for shard in own) for own in windows]
        ends = np.cumsum(sizes)
        for own, begin, end in zip(windows, ends - sizes, ends, strict=True):
            assert set(shard_of[rows[begin:end]].tolist()) == own
    assert visited[0] != visited[1]
    assert [ordered(0, index) for index in range(sum(parts))] == visited[0], "a pure function of epoch and place"


def test_the_shards_that_are_needed_are_those_of_this_window_and_the_next() -> None:
    parts, window = (7, 3, 0, 12, 5, 9, 1, 4), 2
    ordered = WindowedOrder(3, "pairs/0", parts, window)
    shard_of = np.repeat(np.arange(len(parts)), parts)
    drawn = [int(shard_of[ordered(1, index)]) for index in range(sum(parts))]
    needed = [ordered.needed(1, index) for index in range(sum(parts))]
    for place, shards in enumerate(needed):
        assert drawn[place] in shards and 2 not in shards and len(shards) <= 2 * window
    for shard in set(drawn):
        first = drawn.index(shard)
        known = next(place for place, shards in enumerate(needed) if shard in shards)
        assert known == 0 or shard not in needed[known - 1] and known < first, "known a window before"
    whole = WindowedOrder(3, "pairs/0", parts, None)
    assert whole.needed(0, 0) == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_store_of_no_more_shards_than_a_window_is_shuffled_as_a_whole(window: int | None) -> None:
    ordered, whole = WindowedOrder(5, "pairs/0", (4, 8, 6), window), order(5, "pairs/0", 2, 18)
    assert [ordered(2, index) for index in range(18)] == [whole(index) for index in range(18)]
