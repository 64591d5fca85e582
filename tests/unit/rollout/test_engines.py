"""An interpreter for rollout actors is tried before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rayalign.errors import UserError
from rayalign.rollout.engines import refuse_missing_engine


def test_this_environment_can_serve_itself() -> None:
    refuse_missing_engine("hf", sys.executable)


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"rollout.python: {tmp_path}/none is no Python that answers"):
        refuse_missing_engine("hf", f"{tmp_path}/none")
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    with pytest.raises(UserError, match="is no Python that answers"):
        refuse_missing_engine("hf", str(silent))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[[3, 1], [true, true]]", r"is Python 3\.1, and Ray needs that of this process"),
        ("[[{major}, {minor}], [false, false]]", "has no rayalign; install rayalign=="),
        ('[[{major}, {minor}], ["{rayalign}", "2.0.0"]]', r"has ray 2\.0\.0; install ray=="),
    ],
)
def test_another_environment_must_match(tmp_path: Path, answer: str, message: str) -> None:
    from importlib.metadata import version

    facts = {"major": sys.version_info[0], "minor": sys.version_info[1], "rayalign": version("rayalign")}
    for name, value in facts.items():
        answer = answer.replace(f"{{{name}}}", str(value))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=message):
        refuse_missing_engine("hf", str(python))
