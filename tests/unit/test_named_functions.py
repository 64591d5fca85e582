"""What people name as ``module:function``: whatever is wrong with it is told with the file and the line."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from rayalign.errors import UserError
from rayalign.imports import load_function, load_object, source_digest

BROKEN = {
    "syntax": ("def f(:\n", "cannot be imported: SyntaxError: .*syntax.py:1"),
    "missing": (
        "import no_such_thing\n",
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing' .*missing.py:1",
    ),
    "raises": ("x = 1\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero .*raises.py:2"),
    "deep": ("def g():\n    raise ValueError('two\\nlines')\ng()\n", "cannot be imported: ValueError: two .*deep.py:2"),
    "ends": ("import sys\nsys.exit(3)\n", "cannot be imported: SystemExit: 3 .*ends.py:2"),
    "relative": ("from . import other\n", "cannot be imported: ImportError: attempted relative import"),
}


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, as_file: bool
) -> None:
    text, message = BROKEN[name]
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    asked = f"{path}:f" if as_file else f"{name}:f"
    for _ in range(2):  # nothing of it is left behind that a second look would find
        with pytest.raises(UserError, match=message):
            load_object(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("no_such_pkg.rewards:helpful", "there is no module 'no_such_pkg'"),
        ("/nowhere/rewards.py:helpful", "there is no file /nowhere/rewards.py"),
        ("json:no_such", "json has no 'no_such'; check the spelling"),
        ("json", "names nothing to import: write module:name"),
        ("json:", "names nothing to import"),
        ("../x:y", "names nothing to import"),
    ],
)
def test_names_of_nothing(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_object(asked)


def test_other_parameters_and_no_functions() -> None:
    with pytest.raises(UserError, match=r"takes \(obj, fp, .*\), and is called with \(1\): missing a required arg"):
        load_function("json:dump", 1)
    with pytest.raises(UserError, match="is a str, not a function"):
        load_function("json:__name__")


def test_ctrl_c_while_a_module_is_imported_is_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_object(f"{tmp_path / 'slow.py'}:f")


ENDS = "raise SystemExit('run')\n"


def test_a_source_is_digested_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unrun_rewards.py").write_text(ENDS)
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(ENDS.encode()).hexdigest()
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
