"""What signals do to a command: real ones, sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rayalign.errors import Stopped
from rayalign.stop import stopping


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Whoever started the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_is_not_patient(number: int, code: int) -> None:
    with pytest.raises(Stopped, match="^stopped$") as stopped, stopping():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_signal_is_seen_and_the_second_ends() -> None:
    with pytest.raises(KeyboardInterrupt), stopping() as request, request.patience():
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_stopped_by_itself_has_the_code_of_its_signal() -> None:
    expected = pytest.raises(Stopped, match="^stopped after step 3 of 5$")
    with expected as stopped, stopping() as request, request.patience():
        os.kill(os.getpid(), signal.SIGINT)
        raise Stopped("stopped after step 3 of 5")
    assert stopped.value.exit_code == 130


def test_another_thread_takes_no_signals_and_has_its_patience() -> None:
    seen: list[bool] = []

    def work() -> None:
        with stopping() as request, request.patience():
            seen.append(request.patient)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_what_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request.asked
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    program = (
        "import sys, rayalign.__main__ as command\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "command.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_command_that_is_ended_at_once_says_how_to_go_on() -> None:
    program = (
        "import sys, rayalign.cli as cli, rayalign.config.init as init\n"
        "def template(name): raise KeyboardInterrupt\n"
        "init.template = template\n"
        "sys.argv = ['rayalign', 'init', 'dpo']\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr == "stopped; the same command continues a run from its newest checkpoint\n"
