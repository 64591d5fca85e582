"""A file that is one JSON array, item by item, in bounded memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from rayalign.data.json_rows import DECODER, check_row
from rayalign.data.records import Row
from rayalign.errors import UserError

_SPACES = frozenset(" \t\r\n")


def array_rows(chunks: Iterator[bytes], source: str, *, max_row_bytes: int) -> Iterator[Row]:
    """The items of an array as rows, numbered from 1.

    Raises:
        UserError: the array is no valid JSON. Where its items end can then not be known, so that none after the mistake
            could be read.
    """
    text = _Text(chunks, source)
    text.skip("[")
    number = 0
    while text.peek() != "]":
        number += 1
        if number > 1:
            text.skip(",", item=number)
        value, written = text.item(number, most=max_row_bytes)
        yield check_row(value, written, source=source, line=number)
    text.skip("]")
    if text.peek():
        raise UserError(f"{source}: text follows the end of the JSON array; remove it")


class _Text:
    """A stream of UTF-8, of which everything before ``at`` was used."""

    def __init__(self, chunks: Iterator[bytes], source: str) -> None:
        self.chunks = chunks
        self.source = source
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.text[self.at : self.at + 1] in _SPACES:
                self.at += 1
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def skip(self, expected: str, *, item: int = 0) -> None:
        found = self.peek()
        if found != expected:
            where = f"before item {item}" if item else "at its beginning"
            raise UserError(f"{self.source}: no valid JSON array: {found or 'its end'!r} {where}, not {expected!r}")
        self.at += 1

    def item(self, number: int, *, most: int) -> tuple[object, str]:
        """(the next value, as it was written)."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise UserError(f"{self.source}: item {number} of the JSON array is nested too deeply") from error
            except ValueError as error:
                if len(self.text) - self.at > most or not self._read():
                    raise UserError(f"{self.source}: item {number} of the JSON array: {error}") from error
                continue
            written, self.at = self.text[self.at : end], end
            return value, written

    def _read(self) -> bool:
        """Another chunk behind what is not used yet; False at the end."""
        try:
            chunk = next(self.chunks, None)
            more = self.decoder.decode(chunk or b"", final=chunk is None)
        except (EOFError, UnicodeDecodeError) as error:
            raise UserError(f"{self.source}: the JSON array cannot be read: {error}") from error
        self.text, self.at = self.text[self.at :] + more, 0
        return chunk is not None
