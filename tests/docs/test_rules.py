"""The page about templates names every rule by which a row may differ from its conversation."""

from __future__ import annotations

import re

from pages import REPOSITORY

from rayalign.data.render import RULES


def test_every_rule_is_explained() -> None:
    page = (REPOSITORY / "docs" / "explanation" / "templates.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(RULES)
