"""Jobs reach workers once, in their order, whatever the workers missed before."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray
from ray.util.placement_group import PlacementGroup

from rayalign.errors import Stopped
from rayalign.runtime.jobs import NoteTable
from rayalign.runtime.worker import Mailbox, TrainJob


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(NoteTable())


def job(name: str) -> TrainJob:
    return cast(TrainJob, SimpleNamespace(run=name))


def test_jobs_come_in_order_until_the_mailbox_is_closed(mailbox: Mailbox) -> None:
    assert [mailbox.post(job(name)) for name in "ab"] == [0, 1]
    jobs = mailbox.jobs()
    assert [(number, found.run) for number, found in (next(jobs), next(jobs))] == [(0, "a"), (1, "b")]
    mailbox.close()
    assert list(jobs) == []


def test_an_answer_is_seen_by_its_number(mailbox: Mailbox, tmp_path: Path) -> None:
    number = mailbox.post(job("a"))
    assert mailbox.answered(number) is None
    mailbox.answer(number, tmp_path / "final")
    assert mailbox.answered(number) == tmp_path / "final"


def test_a_restarted_worker_goes_on_with_the_job_that_has_no_answer(mailbox: Mailbox, tmp_path: Path) -> None:
    for name in "ab":
        mailbox.post(job(name))
    mailbox.answer(0, tmp_path)
    number, found = next(mailbox.jobs())
    assert (number, found.run) == (1, "b")


def test_a_stop_is_answered_with_how_far_the_job_is(mailbox: Mailbox) -> None:
    number = mailbox.post(job("a"))
    assert not mailbox.is_taken(number) and not mailbox.stop_is_asked()
    mailbox.take(number)
    mailbox.ask_to_stop()
    assert mailbox.is_taken(number) and mailbox.stop_is_asked()
    mailbox.stopped(number, "stopped after step 3 of 5")
    with pytest.raises(Stopped, match="^stopped after step 3 of 5$"):
        mailbox.answered(number)


class Gone(NoteTable):
    """What workers see when the driver and its table have ended."""

    def read(self, name: str) -> bytes | None:
        return None

    def is_there(self) -> bool:
        return False


def test_a_mailbox_that_is_gone_ends_the_workers() -> None:
    mailbox = Mailbox(Gone())
    assert not mailbox.stop_is_asked() and mailbox.reserved() is None
    assert list(mailbox.jobs()) == []


def test_a_job_that_was_stopped_says_how_far_it_is(mailbox: Mailbox) -> None:
    number = mailbox.post(job("a"))
    assert not mailbox.stop_is_asked()
    mailbox.ask_to_stop()
    assert mailbox.stop_is_asked() and mailbox.answered(number) is None
    mailbox.stopped(number, "stopped after step 3 of 9")
    with pytest.raises(Stopped, match="stopped after step 3 of 9"):
        mailbox.answered(number)


def test_it_says_where_the_workers_are(mailbox: Mailbox) -> None:
    room = PlacementGroup(ray.PlacementGroupID.from_random())
    assert mailbox.places() == {} and mailbox.reserved() is None
    mailbox.reserve(room)
    mailbox.register(3)
    found = mailbox.reserved()
    assert found is not None and found.id == room.id
    assert mailbox.places() == {3: f"process {os.getpid()} on {socket.gethostname()}"}
