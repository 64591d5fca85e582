"""Jobs reach workers once, in their order, whatever the workers missed before."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from rayalign.errors import Stopped
from rayalign.runtime.worker import Mailbox, TrainJob


@pytest.fixture
def mailbox(tmp_path: Path) -> Mailbox:
    folder = tmp_path / "mailbox"
    folder.mkdir()
    return Mailbox(folder)


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


def test_a_removed_mailbox_ends_the_workers(mailbox: Mailbox) -> None:
    jobs = mailbox.jobs()
    shutil.rmtree(mailbox.folder)
    assert list(jobs) == []


def test_a_job_that_was_stopped_says_how_far_it_is(mailbox: Mailbox) -> None:
    number = mailbox.post(job("a"))
    assert not mailbox.stop_is_asked()
    mailbox.ask_to_stop()
    assert mailbox.stop_is_asked() and mailbox.answered(number) is None
    mailbox.stopped(number, "stopped after step 3 of 9")
    with pytest.raises(Stopped, match="stopped after step 3 of 9"):
        mailbox.answered(number)
