"""Lines of progress where nobody watches bars."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from rayalign.run.display import ProgressBoard

ROW = {"step": 1, "seconds": 0.5, "num_tokens": 100, "step_tokens": 100}


@pytest.fixture
def printed() -> StringIO:
    return StringIO()


@pytest.fixture
def board(printed: StringIO) -> ProgressBoard:
    return ProgressBoard(Console(file=printed))


@pytest.mark.parametrize(
    ("row", "said"),
    [({**ROW, "loss": 0.69311}, "loss 0.6931"), ({**ROW, "loss": None}, "skipped"), (ROW, "skipped")],
    ids=["trained", "a loss that is not finite", "a pass too many"],
)
def test_a_row_is_a_line(row: dict[str, float], said: str, board: ProgressBoard, printed: StringIO) -> None:
    board.start("mine", 4)
    board.row("mine", row)
    assert printed.getvalue().startswith(f"mine: step 1/4  {said}  ")


def test_brackets_of_a_message_are_no_markup(board: ProgressBoard, printed: StringIO) -> None:
    """As in the file names of gloo's errors."""
    board.say("mine: worker 1 was lost: [/pytorch/third_party/gloo] [rank0] closed")
    assert printed.getvalue() == "mine: worker 1 was lost: [/pytorch/third_party/gloo] [rank0] closed\n"
