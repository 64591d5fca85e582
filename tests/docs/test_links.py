"""Every relative link leads to a file, and every anchor to a heading."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES, REPOSITORY, anchors, links, page_id

OTHERS = [REPOSITORY / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=page_id)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_index() -> None:
    """Within two clicks of ``docs/README.md``, which the README links."""
    index = REPOSITORY / "docs" / "README.md"
    assert "docs/README.md" in set(links(REPOSITORY / "README.md"))
    reached = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert [page_id(page) for page in (REPOSITORY / "docs").rglob("*.md") if page not in {*reached, index}] == []
