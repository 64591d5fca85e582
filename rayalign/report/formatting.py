"""Numbers and words as the report prints them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from rayalign.report.statistics import Estimate

MISSING = "–"
SHARE = "share"
CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
PICTURES = str.maketrans({**CONTROLS, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)})


def format_number(value: float, unit: str = "") -> str:
    """Three or so significant digits; a share in per cent; a real minus sign; a dash where there is no value."""
    if math.isnan(value):
        return MISSING
    if unit == SHARE:
        return f"{100 * value:.{1 if 0 < abs(value) < 0.1 else 0}f} %".replace("-", "−")
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, unit: str = "") -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + format_number(value, unit)


def interval(estimate: Estimate, unit: str = "", show: Callable[[float, str], str] = format_number) -> str:
    """``[low, high]``, or a dash."""
    if math.isnan(estimate.low):
        return MISSING
    return f"[{show(estimate.low, unit).removesuffix(' %')}, {show(estimate.high, unit)}]"


def signed_interval(estimate: Estimate, unit: str = "") -> str:
    """The interval of a difference."""
    return interval(estimate, unit, signed)


def p_value(value: float) -> str:
    """Three decimals; below a thousandth, that."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_optional(value: float | None, unit: str = "") -> str:
    """The number of one reply, which may be missing."""
    return MISSING if value is None else format_number(value, unit)


def format_count(value: float | None) -> str:
    """A count: exact below ten thousand, then to about three digits with k, M or G."""
    if value is None:
        return MISSING
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{format_number(value / factor)} {letter}"
    return f"{value:.0f}"


def filter_sentence(*, kept: int, of: int, unit: str, threshold: float, **_: float) -> str:
    """What a filter left: ``kept 694 of 2,312 pairs, threshold −1.23 nats per token``."""
    return f"kept {kept:,} of {of:,} {unit}, threshold {format_number(threshold)} nats per token"


def policy_in_words(name: str) -> str:
    """``off_policy`` as words."""
    return name.replace("_", "-")


def escaped(text: str) -> str:
    """Text that is inert in Markdown; of brackets only those that would make a link are escaped."""
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(raw, safe)
    return re.sub(r"[\\|`*]|\](?=[(\[:])|^\s*[#+-](?=[#\s])", r"\\\g<0>", text)


def markdown(text: str) -> str:
    """Text that is inert and stays on its line in a Markdown table."""
    return " ".join(escaped(text).split())


def printable(text: str) -> str:
    """Text with a picture in place of every control character but line ends and tabs.

    A terminal obeys them: an answer with an escape sequence could write the clipboard or repaint lines above it.
    """
    return text.translate(PICTURES)


def indented(text: str) -> str:
    """Text as a Markdown code block: nothing in it is markup."""
    return "\n".join("    " + line for line in text.splitlines() or [""])


FILTERS: Mapping[str, Callable[..., str]] = {
    "number": format_number,
    "interval": interval,
    "signed": signed,
    "signed_interval": signed_interval,
    "p_value": p_value,
    "count": format_count,
    "policy": policy_in_words,
    "markdown": markdown,
    "indented": indented,
}
"""What templates call these functions."""
