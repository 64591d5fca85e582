"""One row of JSON: bytes → a row, or why they are none."""

from __future__ import annotations

import json
from typing import Any

from rayalign.data.records import BadRow, RawRow, Row, excerpt_of

JSON_WHITESPACE = b" \t\r\n"
DECODER = json.JSONDecoder(strict=False)


def parse_json_row(data: bytes, *, source: str, line: int, ended: bool = True) -> Row:
    """A line that is not blank as a row; ``ended`` is False where the file stops without a line end."""
    try:
        text = data.decode("utf-8")
        value: Any = DECODER.decode(text)
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at byte {error.start + 1} of the line"
    except RecursionError:
        reason = "the JSON is nested too deeply"
    except ValueError as error:
        reason = f"not valid JSON: {error}" if ended else f"the file ends inside this line: {error}"
    else:
        return check_row(value, text, source=source, line=line)
    return BadRow(source=source, line=line, reason=reason, excerpt=excerpt_of(data))


def check_row(value: Any, written: str, *, source: str, line: int) -> Row:
    """A value as a row, an object whose texts are text; ``written`` is its text in the file."""
    reason = ""
    if not isinstance(value, dict):
        reason = f"a row must be one JSON object, not a {type(value).__name__}"
    elif "\\u" in written:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            reason = "half of a surrogate pair (\\ud800 … \\udfff) is not a character"
    if reason:
        return BadRow(source=source, line=line, reason=reason, excerpt=excerpt_of(written.encode()))
    return RawRow(source=source, line=line, value=value)
