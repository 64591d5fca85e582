"""Numbers and words as the report prints them."""

from __future__ import annotations

import math

from rayalign.report.statistics import Estimate

MISSING = "–"
SHARE = "share"


def number(value: float, unit: str = "") -> str:
    """Three or so significant digits; a share in per cent; a real minus sign; a dash where there is no value."""
    if math.isnan(value):
        return MISSING
    if unit == SHARE:
        return f"{100 * value:.0f} %".replace("-", "−")
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def interval(estimate: Estimate, unit: str = "") -> str:
    """``[low, high]``, or a dash."""
    if math.isnan(estimate.low):
        return MISSING
    return f"[{number(estimate.low, unit).removesuffix(' %')}, {number(estimate.high, unit)}]"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + number(value)


def count(value: float | None) -> str:
    """A count: exact below ten thousand, then with one decimal and k, M or G."""
    if value is None:
        return MISSING
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / factor:.1f} {letter}"
    return f"{value:.0f}"


def policy(name: str) -> str:
    """``off_policy`` as words."""
    return name.replace("_", "-")


def markdown(text: str) -> str:
    """Text that is inert and stays on its line in a Markdown table."""
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(raw, safe)
    return " ".join(text.split())


def indented(text: str) -> str:
    """Text as a Markdown code block: nothing in it is markup."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
