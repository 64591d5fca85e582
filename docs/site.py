"""Hooks of MkDocs (`make site`): links that lead out of ``docs/``, formulas, and cross-references in docstrings."""

from __future__ import annotations

import html
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

REPOSITORY = "https://github.com/rayalign/rayalign/blob/main"
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>~?")
_FORMULA = re.compile(r'<(?P<kind>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=kind)>', re.DOTALL)
_LINK = re.compile(r"(?<=\])\((?P<target>\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """The page's Markdown, every link out of ``docs/`` made an address."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def address(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found["target"]))
        return found[0] if path.startswith("docs/") else f"({REPOSITORY}/{path})"

    return _LINK.sub(address, markdown)


def on_page_content(page_html: str, **_: object) -> str:
    """The page's HTML with formulas as MathML, which needs no script, and Sphinx's cross-references as code."""
    return _FORMULA.sub(_mathml, _ROLE.sub("<code>", page_html))


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found["kind"] == "div" else "inline"
    mathml: str = convert(html.unescape(found["latex"]), display=display)
    return mathml
