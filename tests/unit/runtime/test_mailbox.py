"""Jobs reach workers once, in their order, whatever the workers missed before."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray
from ray.util.placement_group import PlacementGroup

from rayalign.errors import Stopped
from rayalign.runtime.jobs import JobTable
from rayalign.runtime.worker import Mailbox, TrainJob


@pytest.fixture
def mailbox(tmp_path: Path) -> Mailbox:
    folder = tmp_path / "mailbox"
    folder.mkdir()
    return Mailbox(folder, JobTable())


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


def test_its_files_are_plain_text_and_no_job(mailbox: Mailbox, tmp_path: Path) -> None:
    room = PlacementGroup(ray.PlacementGroupID.from_random())
    number = mailbox.post(job("a"))
    mailbox.take(number)
    mailbox.reserve(room)
    mailbox.answer(number, tmp_path / "final")
    files = {path.name: path.read_text(encoding="ascii") for path in mailbox.folder.iterdir()}
    assert files == {
        "000000.job": "a",
        "000000.taken": "",
        "000000.final": str(tmp_path / "final"),
        "room": room.id.hex(),
    }
    found = mailbox.reserved()
    assert found is not None and found.id == room.id


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_what_others_write_into_its_folder_is_not_run(mailbox: Mailbox, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    code = pickle.dumps(Planted(planted))
    mailbox.post(job("a"))
    (mailbox.folder / "000000.job").write_bytes(code)
    (mailbox.folder / "000001.job").write_bytes(code)
    (mailbox.folder / "room").write_bytes(code)
    jobs = mailbox.jobs()
    assert next(jobs)[1].run == "a"
    mailbox.close()
    assert list(jobs) == []  # nothing was posted under the second number
    with pytest.raises(UnicodeDecodeError):
        mailbox.reserved()
    assert not planted.exists()
    pickle.loads(code).close()
    assert planted.exists()
