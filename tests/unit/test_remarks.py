"""Remarks: each line once, some of them only, and nothing that moves a cursor."""

from __future__ import annotations

from types import SimpleNamespace

from rayalign.remarks import CHARACTERS, MOST, Remarks, remarks_of


def test_each_line_is_told_once_and_not_all_of_them() -> None:
    remarks = Remarks()
    for line in ("a", "b", "a", "", "  ", "a\n"):
        remarks.add(line)
    assert remarks.take() == ("a", "b") and remarks.take() == ()
    for number in range(100):
        remarks.add(f"line {number}")
    assert remarks.take() == tuple(f"line {number}" for number in range(MOST - 2))


def test_a_line_is_short_and_plain() -> None:
    remarks = Remarks()
    remarks.add("\x1b[2Jred\x07 " + "x" * 1000)
    (line,) = remarks.take()
    assert line.startswith("[2Jred x") and len(line) == CHARACTERS


def test_what_remarks_on_nothing_has_none() -> None:
    assert remarks_of(SimpleNamespace()) == () == remarks_of(SimpleNamespace(remarks=None))
