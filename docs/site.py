"""Hooks of MkDocs (`make site`): links that lead out of ``docs/``, and cross-references in docstrings."""

from __future__ import annotations

import posixpath
import re
from typing import Any

REPOSITORY = "https://github.com/rayalign/rayalign/blob/main"
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>~?")
_LINK = re.compile(r"(?<=\])\((?P<target>\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """The page's Markdown, every link out of ``docs/`` made an address."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def address(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found["target"]))
        return found[0] if path.startswith("docs/") else f"({REPOSITORY}/{path})"

    return _LINK.sub(address, markdown)


def on_page_content(html: str, **_: object) -> str:
    """The page's HTML, Sphinx's cross-references shown as code."""
    return _ROLE.sub("<code>", html)
