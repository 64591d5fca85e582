"""Tables for a terminal of eighty columns: names are folded, and no word is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rayalign.report.formatting import MISSING

EMPTY = ("", MISSING)


def narrow_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, caption: str = "") -> Table:
    """A table of texts, not of markup. The first column is folded where it is long.

    A column without any value is left out.
    """
    table = Table(
        title=title or None,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    shown = [number for number, texts in enumerate(columns) if number == 0 or set(texts) - set(EMPTY)]
    for number in shown:
        table.add_column(names[number], no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[number]) for number in shown))
    return table
