"""``report.md``: the short form of the page, made from its HTML.

A ``<details>`` that is closed or has ``data-folded`` becomes a pointer to the page; a figure becomes a link to its
file. What has ``data-page-only`` is left out. All text is escaped: nothing that a model or a user wrote is markup.
"""

from __future__ import annotations

import re

from bs4 import BeautifulSoup, Tag
from markdownify import ATX, MarkdownConverter

from rayalign.report.formatting import escaped, indented

PAGE = "report.html"
ONLY_ON_THE_PAGE = "[data-page-only], .key, script"
BLOCKS = {"body", "header", "main", "section", "fieldset", "details", "div", "ul", "dl"}
"""Elements in which white space between two others means nothing."""
_BLANK = re.compile(r"^\s*$")
_PLAIN_CODE = re.compile(r"[\w .,:;/=@+(){}'\"\[\]-]+")


def page_markdown(html: str) -> str:
    """The Markdown of a page's header and main part."""
    soup = BeautifulSoup(html, "html.parser")
    for element in soup.select(ONLY_ON_THE_PAGE):
        element.decompose()
    for folded in soup.select("details:not([open]), details[data-folded]"):
        _point_to_the_page(folded, soup)
    for row in soup.select("tr.groups"):
        _name_groups(row, soup)
    for space in soup.find_all(string=_BLANK):
        if space.parent is not None and space.parent.name in BLOCKS:
            space.extract()
    converter = _Converter(heading_style=ATX, bullets="-", autolinks=False, wrap=True, wrap_width=None)
    return converter.convert_soup(soup.body).strip() + "\n"


def _point_to_the_page(folded: Tag, soup: BeautifulSoup) -> None:
    summary = folded.find("summary")
    pointer = soup.new_tag("p")
    name = soup.new_tag("em")
    name.string = summary.get_text() if summary else ""
    link = soup.new_tag("a", href=PAGE)
    link.string = PAGE
    pointer.extend([name, ": in ", link])
    folded.replace_with(pointer)


def _name_groups(row: Tag, soup: BeautifulSoup) -> None:
    """Say above a table what its columns share: Markdown has one row of heads."""
    words = [cell.get_text() for cell in row.find_all("th")]
    note = soup.new_tag("p")
    note.string = "; ".join(words)
    table = row.find_parent("table")
    assert table is not None
    table.insert_before(note)
    row.decompose()


class _Converter(MarkdownConverter):
    """The library's way to say how elements are written is a method per element."""

    def escape(self, text: str, parent_tags: set[str]) -> str:
        return escaped(text)

    def convert_code(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else escaped(text)

    def convert_small(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if not text.strip():
            return ""
        return f" ({text.strip()})" if "th" in parent_tags else f" {text.strip()}"

    def convert_summary(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f"\n\n**{' '.join(text.split())}**\n\n"

    def convert_figure(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        stem = str(el["data-stem"])
        return f"\n![{stem.replace('-', ' ')}]({stem}.svg)\n"

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f"\n\n{indented(text)}\n\n"

    def convert_dt(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f"\n- **{text.strip()}**: "

    def convert_dd(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f"{text.strip()}\n"
