"""The formats that rows come in, found by their columns or named: one function each from columns to a body.

``docs/how-to/data.md`` lists them with their columns; a test holds the page to :data:`FORMATS`.
"""

from rayalign.data.formats.base import Body, Format
from rayalign.data.formats.detect import FORMATS, detect_format
from rayalign.data.formats.names import ANSWERS, NUMBERS, first_known_name
from rayalign.data.formats.parse import parse_row

__all__ = ["ANSWERS", "FORMATS", "NUMBERS", "Body", "Format", "detect_format", "first_known_name", "parse_row"]
