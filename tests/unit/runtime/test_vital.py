"""A program whose child of a vital name ends: real processes, no Ray."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import REPOSITORY

PROGRAM = """
import ctypes, os, signal, subprocess, sys, threading
from rayalign.runtime.vital import Vital
from rayalign.stop import StopRequest

victim, way, settled = sys.argv[1:]
vital = Vital()
vital.watch()
children = {
    name: subprocess.Popen([f"{sys.path[-1]}/{name}", "-c", "read ending; exit $ending", f"--log_dir=/logs of {name}"],
                           stdin=subprocess.PIPE, text=True)
    for name in ("gcs_server", "raylet", "bystander")
}
while len(vital.watched) < 2:
    pass
print("watched", flush=True)
if settled == "stopping":
    vital.stop = StopRequest(number=signal.SIGTERM)
if settled == "before":
    vital.settle()
if settled == "released":
    vital.release()
if way == "the command":
    os.kill(os.getpid(), signal.SIGKILL)
if settled == "too late":  # as Ray's C++ ends a process: no other thread of it comes to a word
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    holding = ctypes.PyDLL(None)
    holding.kill(children[victim].pid, signal.Signals[way])
    holding.usleep(50_000_000)
if way.isdigit():
    children[victim].stdin.write(way + "\\n")
    children[victim].stdin.flush()
else:
    os.kill(children[victim].pid, signal.Signals[way])
if settled == "meanwhile":
    threading.Timer(0.1, vital.settle).start()
children[victim].wait() if settled == "released" or victim == "bystander" else threading.Event().wait(60)
vital.settle()  # the children end now, as they do after a command's last word
for child in children.values():
    child.kill()
print("lives")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell of children")
@pytest.mark.parametrize(
    ("victim", "way", "settled", "code", "expected"),
    [
        ("raylet", "SIGKILL", "no", 1, "error: Ray's raylet ended (SIGKILL, as when memory runs out) while this comm"),
        ("raylet", "SIGSEGV", "no", 1, "error: Ray's raylet ended (SIGSEGV) while this command ran; the same command"),
        ("gcs_server", "SIGKILL", "no", 1, "error: Ray's GCS ended (SIGKILL, as when memory runs out) while this"),
        ("gcs_server", "1", "no", 1, "error: Ray's GCS ended (exit code 1) while this command ran; the same command"),
        ("gcs_server", "SIGTERM", "no", 143, "stopped: Ray's GCS was asked to end (SIGTERM); the same command contin"),
        ("raylet", "0", "no", 143, "stopped: Ray's raylet was asked to end (exit code 0); the same command continues"),
        (
            "raylet",
            "1",
            "stopping",
            143,
            "stopped: Ray's raylet ended (exit code 1) before this command, which was asked",
        ),
        ("raylet", "SIGKILL", "before", 0, ""),
        ("gcs_server", "SIGKILL", "meanwhile", 0, ""),
        ("raylet", "SIGKILL", "released", 0, ""),
        ("bystander", "SIGKILL", "no", 0, ""),
        (
            "raylet",
            "SIGKILL",
            "too late",
            -14,
            "error: Ray's raylet ended (SIGKILL, as when memory runs out) while this",
        ),
        ("gcs_server", "SIGTERM", "too late", -14, "stopped: Ray's GCS was asked to end (SIGTERM); the same command"),
        ("raylet", "the command", "no", -9, ""),
    ],
)
def test_a_command_ends_with_its_ray(
    tmp_path: Path, victim: str, way: str, settled: str, code: int, expected: str
) -> None:
    for name in ("gcs_server", "raylet", "bystander"):
        shutil.copy("/bin/sh", tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(tmp_path)!r})\n{PROGRAM}", victim, way, settled],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=REPOSITORY,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == bool(expected)
    if expected:
        assert f"Ray's logs: /logs of {victim}\n" in done.stderr and done.stdout == "watched\n"
