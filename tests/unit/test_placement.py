"""Shares of clusters, checked by putting the processes on the nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayalign.errors import UserError
from rayalign.placement import Node, Share, elastic_share, even_share, guest_share, host_share
from rayalign.runtime.elastic import num_fitting_node
from rayalign.runtime.session import Session


def cluster(*nodes: tuple[float, float]) -> Session:
    """A session whose nodes have (CPUs, GPUs)."""
    made = (Node(id=str(index), name="", cpus=cpus, gpus=gpus) for index, (cpus, gpus) in enumerate(nodes))
    return Session(started_here=False, nodes=tuple(made))


def places(session: Session, each: Share) -> int:
    """How many processes of this share the cluster holds, in ten-thousandths as Ray counts."""

    def whole(value: float) -> int:
        return round(value * 10_000)

    total = 0
    for node in session.nodes:
        by_cpu = whole(node.cpus) // whole(each.cpus) if each.cpus else 10**9
        by_gpu = int(node.gpus) * (10_000 // whole(each.gpus)) if each.gpus else 10**9
        total += min(by_cpu, by_gpu)
    return total


@pytest.mark.parametrize(
    ("nodes", "processes", "expected"),
    [
        ([(2, 0)], 1, Share(cpus=2, gpus=0, threads=2)),
        ([(2, 0)], 2, Share(cpus=1, gpus=0, threads=1)),
        ([(2, 0)], 3, Share(cpus=0.6, gpus=0, threads=1)),
        ([(1, 0)], 4, Share(cpus=0.2, gpus=0, threads=1)),
        ([(3, 0), (3, 0)], 3, Share(cpus=1, gpus=0, threads=1)),  # two CPUs each would leave the third nowhere
        ([(0, 0), (8, 0)], 2, Share(cpus=4, gpus=0, threads=4)),  # a head that runs nothing
        ([(16, 8)], 8, Share(cpus=2, gpus=1, threads=2)),
        ([(16, 8)], 2, Share(cpus=2, gpus=1, threads=2)),
        ([(16, 1)], 2, Share(cpus=8, gpus=0.5, threads=8)),
        ([(4, 8)], 8, Share(cpus=0.5, gpus=1, threads=1)),
        ([(32, 0), (8, 4), (4, 4)], 8, Share(cpus=1, gpus=1, threads=1)),
    ],
)
def test_shares(nodes: list[tuple[float, float]], processes: int, expected: Share) -> None:
    assert even_share(cluster(*nodes), processes) == expected


@pytest.mark.parametrize(
    ("nodes", "others", "fewest", "most", "expected"),
    [
        ([(4, 0)], 0, 2, 2, Share(cpus=2, gpus=0, threads=2)),  # one number
        ([(4, 0)], 0, 1, 2, Share(cpus=2, gpus=0, threads=2)),  # the most have room
        ([(2, 0)], 0, 1, 4, Share(cpus=1, gpus=0, threads=1)),  # two now; more when nodes join
        ([(1, 0)], 0, 1, 2, Share(cpus=1, gpus=0, threads=1)),
        ([(1, 0)], 1, 1, 2, Share(cpus=0.5, gpus=0, threads=1)),  # an actor beside the one worker
        ([(16, 2)], 0, 1, 4, Share(cpus=8, gpus=1, threads=8)),
        ([(16, 8)], 0, 1, 4, Share(cpus=2, gpus=1, threads=2)),
    ],
)
def test_elastic_workers_have_a_device_each_where_they_can(
    nodes: list[tuple[float, float]], others: int, fewest: int, most: int, expected: Share
) -> None:
    assert elastic_share(cluster(*nodes), others, fewest=fewest, most=most) == expected


def test_workers_never_share_a_gpu_with_an_actor_that_has_none() -> None:
    with pytest.raises(UserError, match="2 processes need a GPU each, the cluster has 1"):
        elastic_share(cluster((8, 1)), 1, fewest=1, most=2)


def test_what_fits_is_bounded_by_the_scarcest() -> None:
    free = {"CPU": 3.0, "GPU": 2.0}
    assert num_fitting_node(Share(cpus=0.6, gpus=0, threads=1), free) == 5
    assert num_fitting_node(Share(cpus=1, gpus=1, threads=1), free) == 2
    assert num_fitting_node(Share(cpus=1, gpus=1, threads=1), {"CPU": 4.0}) == 0


@given(
    nodes=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5),
    processes=st.integers(1, 10),
)
def test_all_processes_find_a_place(nodes: list[tuple[float, float]], processes: int) -> None:
    session = cluster(*nodes)
    assert places(session, even_share(session, processes)) >= processes


def test_workers_of_one_run_do_not_share_a_gpu() -> None:
    with pytest.raises(UserError, match="4 processes need a GPU each, the cluster has 2: lower strategy.workers"):
        even_share(cluster((16, 2)), 4, workers=4)


def test_more_processes_than_cores_can_take() -> None:
    assert even_share(cluster((2, 0)), 20).cpus == 0.1
    with pytest.raises(UserError, match="21 processes .* more than 10 for each of the cluster's 2 CPUs"):
        even_share(cluster((2, 0)), 21)


def test_resources_name_gpus_only_where_there_are_some() -> None:
    assert Share(cpus=2, gpus=0, threads=2).resources() == {"CPU": 2}
    assert Share(cpus=2, gpus=1, threads=2).resources() == {"CPU": 2, "GPU": 1}


def test_a_worker_and_its_guest_fill_one_device_and_two_workers_never_do() -> None:
    each = Share(cpus=4, gpus=1, threads=4)
    assert host_share(each) == Share(cpus=4, gpus=0.9, threads=4)
    assert guest_share(each) == Share(cpus=0, gpus=0.1, threads=4)
    assert guest_share(Share(cpus=2, gpus=0, threads=2)) == Share(cpus=0, gpus=0, threads=2)
    assert places(cluster((8, 2)), host_share(each)) == 2
