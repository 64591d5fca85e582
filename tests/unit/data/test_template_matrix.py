"""Every template × every shape of a conversation: equal to ``apply_chat_template``, a stated rule, or refused.

The table in ``template_matrix.txt`` says what becomes of each cell, and the oracle checks it against the template.
Write it again with ``python tests/unit/data/test_template_matrix.py``, and read what changed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import families
import pytest
from rendering_oracle import check, check_refusal, letters
from shapes import MEANING, SHAPES

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.records import BadRow, RawRow
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.errors import UserError

TABLE = Path(__file__).parent / "template_matrix.txt"
UNLIMITED = TokenBudget(max_prompt_tokens=100_000, max_tokens=200_000)
LEGEND = """\
=  the tokens are those of the whole conversation as the template writes it, and every answer is predicted
+  the same, and the run's end token, since the template writes none at the end
c  cut: the prompt ends where the answer parts from the generation prompt
t  thought: a spelled thought continues the generation prompt that opened it; the template would drop it
k  kept: the prompt keeps what inference shows and the whole conversation drops
h  history: an answer that the history writes otherwise is seen, not predicted
n  names: the template leaves out a name
-  refused: the template leaves something out
x  refused: the template refuses the turns, in its own words
o  refused: the template writes the prompt otherwise once an answer follows
/  the template refuses texts as contents: it is of a model that reads images
"""


@pytest.mark.parametrize("name", families.names())
def test_every_shape(name: str) -> None:
    assert row_of(name) == expected()[name]


def test_the_table_has_every_template_and_counts_its_cells() -> None:
    assert list(expected()) == families.names()
    assert all(len(row.split()) == len(SHAPES) for row in expected().values())
    assert TABLE.read_text(encoding="utf-8") == table(expected())


def row_of(name: str) -> str:
    """The cells of one template; raises ``Wrong`` where the oracle disagrees."""
    tokenizer = families.tokenizer_of(name)
    try:
        chat = make_chat(tokenizer)
    except UserError:
        return " ".join("/" for _ in SHAPES)
    return " ".join(cell_of(chat, shape) for shape in SHAPES)


def cell_of(chat: Chat, shape: str) -> str:
    (outcome,) = rows_to_groups([RawRow(source=shape, line=1, value=SHAPES[shape])], chat, UNLIMITED)
    if isinstance(outcome, BadRow):
        return check_refusal(outcome.reason, chat.tokenizer, SHAPES[shape])
    assert isinstance(outcome, Tokenized)
    check(outcome, chat.tokenizer, SHAPES[shape], end=chat.end_text)
    return letters(outcome.rules) or ("=" if chat.speaker.endings.own else "+")


def expected() -> dict[str, str]:
    """Template → its cells, as the file has them."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=1) for line in lines[1 : lines.index("")]]
    return {name: " ".join(cells.split()) for name, cells in rows}


def table(rows: dict[str, str]) -> str:
    """The file: a line per template, what the letters and shapes mean, and how often each cell occurs."""
    head = f"{'':32}" + " ".join(f"{shape:2}" for shape in SHAPES)
    lines = [f"{name:32}" + " ".join(f"{cell:2}" for cell in cells.split()) for name, cells in rows.items()]
    cells = Counter(cell for row in rows.values() for cell in row.split())
    counts = [f"{count:5}  {cell}" for cell, count in cells.most_common()]
    meaning = [f"{shape:2}  {words}" for shape, words in MEANING.items()]
    parts = [[head, *lines], LEGEND.splitlines(), meaning, [f"{sum(cells.values()):5}  cells", *counts]]
    return "\n\n".join("\n".join(line.rstrip() for line in part) for part in parts) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table({name: row_of(name) for name in families.names()}), encoding="utf-8")
