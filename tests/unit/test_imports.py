"""Sources of what users name: found and digested without running them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from rayalign.errors import UserError
from rayalign.imports import source_digest

BROKEN = "raise SystemExit('run')\n"


def test_a_source_is_digested_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unrun_rewards.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(BROKEN.encode()).hexdigest()
    assert source_digest("unrun_rewards:f") == source_digest(f"{tmp_path}/unrun_rewards.py:f") == digest
    assert "unrun_rewards" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_rewards:f", "there is no module 'no_such_rewards'; install it"),
        ("no_such_package.rewards:f", "there is no module 'no_such_package'; install it"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
        ("math:sqrt", "math has no source file; name a function of a Python file"),
    ],
)
def test_what_has_no_source_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_digest(name)
