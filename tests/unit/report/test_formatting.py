"""Numbers as they are printed."""

from __future__ import annotations

import math

import pytest

from rayalign.report.formatting import (
    format_count,
    format_number,
    format_optional,
    indented,
    interval,
    markdown,
    signed_interval,
)
from rayalign.report.statistics import Estimate


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.6374, "", "0.637"),
        (-0.0196, "", "−0.020"),
        (6.774, "", "6.77"),
        (14.21, "", "14.2"),
        (395.7, "", "396"),
        (0.153, "share", "15 %"),
        (0.004, "share", "0.4 %"),
        (0.0, "share", "0 %"),
        (math.nan, "share", "–"),
    ],
)
def test_number(value: float, unit: str, text: str) -> None:
    assert format_number(value, unit) == text


def test_intervals() -> None:
    assert interval(Estimate(mean=0.5, low=0.42, high=0.6, n=9)) == "[0.420, 0.600]"
    assert interval(Estimate(mean=0.5, low=0.42, high=0.6, n=9), "share") == "[42, 60 %]"
    assert signed_interval(Estimate(mean=0.0, low=-0.01, high=0.02, n=9)) == "[−0.010, +0.020]"
    assert interval(Estimate(mean=0.5, low=math.nan, high=math.nan, n=1)) == "–"


def test_counts() -> None:
    values = (0, 1600, 9999, 12_340, 310_000, 1_200_000, 2.5e9, None)
    assert [format_count(value) for value in values] == [
        "0",
        "1600",
        "9999",
        "12.3 k",
        "310 k",
        "1.20 M",
        "2.50 G",
        "–",
    ]


def test_one_reply() -> None:
    assert (format_optional(None), format_optional(0.25)) == ("–", "0.250")


def test_markdown_text_is_inert() -> None:
    assert markdown("a | <b>\n`c` [d](e)") == "a \\| &lt;b&gt; \\`c\\` [d\\](e)"
    assert markdown("[d][e] and [0.1, 0.2]") == "[d\\][e] and [0.1, 0.2]"
    assert markdown("# a - b") == "\\# a - b" and markdown("- c") == "\\- c" and markdown("-1") == "-1"
    assert indented("<b>\n# x") == "    <b>\n    # x"
