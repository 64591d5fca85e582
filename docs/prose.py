"""Check the prose of pages and docstrings: ``python -m docs.prose [PATH …]``.

It finds words of ``prose.yaml``, docstrings that begin with "Of", and sentences of more than 25 words.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import yaml

ROOT = Path(__file__).parents[1]
RULES = Path(__file__).with_name("prose.yaml")
PATHS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs", "examples", "cluster", "rayalign")
READ = (".md", ".jinja", ".py")
GENERATED = ("docs/reference/cli.md", "docs/reference/configuration.md", "docs/reference/dependencies.md")
"""Pages whose text comes from the code, where it is checked."""
DATA = ("examples/lab/world.py",)
"""Modules whose strings are data for a model, not words for a reader."""

Kind = Literal["word", "of", "long"]
_FENCE = re.compile(r"^\s*(`{3,})\w*$")
_BLOCK = re.compile(r"^\s*(?:[-*]|\d+\.|#{1,6}|>)\s+")
_CODE = re.compile(r"`+[^`]*`+|\$[^$]*\$|\{\{.*?\}\}")
_BLOCK_END = re.compile(r"</(?:p|h\d|t[hd]|tr|li|d[td]|div|summary|button|small)>")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_NOT_TEXT = re.compile(r"<!--.*?-->|\{#.*?#\}|\{%.*?%\}|<(?:script|style)\b.*?</(?:script|style)>|<[^>]+>", re.DOTALL)
_END = re.compile(r"(?<=[.!?])[)\"'*_”]*\s+(?=[^\sa-zα-ω])|¶")
_WORD = re.compile(r"[^\W_]")
_SECTION = re.compile(r"^(Raises|Args|Returns|Yields|Example|Examples):$")


@dataclass(frozen=True, slots=True)
class Text:
    """One paragraph, list item, table cell, docstring paragraph or string."""

    line: int
    text: str
    is_docstring_start: bool = False
    is_sentence: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One offence."""

    path: Path
    line: int
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Rules:
    """The word list, and the longest sentence in words."""

    limit: int
    words: Mapping[re.Pattern[str], str]


def load_rules(path: Path = RULES) -> Rules:
    """The rules of ``path``."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = {re.compile(rf"\b(?:{own})(?!\w)", re.IGNORECASE): instead for own, instead in read["words"].items()}
    return Rules(limit=read["limit"], words=words)


def page_texts(source: str) -> Iterator[Text]:
    """The paragraphs, list items and table cells of Markdown; fenced blocks and comments are left out."""
    source = _NOT_TEXT.sub(lambda found: "\n" * found[0].count("\n"), _BLOCK_END.sub("¶", source))
    gathered: list[str] = []
    start, fence = 0, ""
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        opened = _FENCE.match(line)
        if opened and (not fence or line.strip() == fence):
            fence = "" if fence else opened[1]
        is_row = line.lstrip().startswith("|")
        ends = bool(fence or opened or is_row or not line.strip() or _BLOCK.match(line))
        if ends and gathered:
            yield Text(start, " ".join(gathered))
            gathered = []
        if fence or opened or not line.strip():
            continue
        if is_row:
            yield from (Text(number, cell.strip()) for cell in re.split(r"(?<!\\)\|", line) if cell.strip())
            continue
        start = start if gathered else number
        gathered.append(_BLOCK.sub("", line).strip())


def code_texts(source: str, *, with_strings: bool = True) -> Iterator[Text]:
    """The docstrings and comments of Python, and the sentences in its strings."""
    tree = ast.parse(source)
    docstrings = {id(node.value): node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in docstrings:
            yield from docstring_texts(node.value, node.lineno)
        elif with_strings and len(node.value.split()) > 2:
            yield Text(node.lineno, node.value, is_sentence=False)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(token.start[0], token.string.lstrip("# "), is_sentence=False)


def docstring_texts(text: str, line: int) -> Iterator[Text]:
    """The paragraphs of one docstring; an indented block is left out, an entry below "Raises:" is one paragraph."""
    number = line
    for position, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        lines = [own.strip() for own in paragraph.strip("\n").splitlines()]
        if lines and _SECTION.match(lines[0]):
            yield from (Text(number, own) for own in lines[1:])
        elif position == 0 or "    " not in paragraph.strip():
            yield Text(number, " ".join(lines), is_docstring_start=position == 0)
        number += paragraph.count("\n") + 2


def texts(path: Path) -> Iterator[Text]:
    """What people read of a page, a template or a module."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from code_texts(source, with_strings=not path.as_posix().endswith(DATA))
    else:
        yield from page_texts(source)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text; code and formulas count as one word, a link as what it shows."""
    plain = _LINK.sub(r"\1", _CODE.sub("Code", text))
    yield from (own for own in _END.split(plain) if own)


def check(path: Path, rules: Rules) -> Iterator[Finding]:
    """Every offence in ``path``."""
    for own in texts(path):
        if own.is_docstring_start and re.match(r"Of\b", own.text):
            yield Finding(path, own.line, "of", f'a docstring begins with "Of": {own.text[:60]}')
        plain = _CODE.sub("Code", own.text)
        for pattern, instead in rules.words.items():
            for found in pattern.finditer(plain):
                yield Finding(path, own.line, "word", f'"{found[0]}"; write: {instead}')
        for sentence in sentences(own.text) if own.is_sentence else ():
            count = sum(bool(_WORD.search(word)) for word in sentence.split())
            if count > rules.limit:
                yield Finding(path, own.line, "long", f"a sentence of {count} words: {sentence[:60]} …")


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that are read, in order; generated pages and what tools leave behind are left out."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for own in found:
            name = str(own.relative_to(ROOT))
            is_hidden = any(part.startswith((".", "runs", "__pycache__")) for part in own.relative_to(ROOT).parts)
            if own.suffix in READ and own.is_file() and name not in GENERATED and not is_hidden:
                yield own


def main(arguments: Sequence[str]) -> int:
    """Print every offence with its line; 1 where there is one."""
    paths = [Path(own).resolve() for own in arguments] or [ROOT / own for own in PATHS]
    rules = load_rules()
    findings = list(chain.from_iterable(check(path, rules) for path in files(paths)))
    for finding in findings:
        print(finding)
    total = Counter(own.kind for own in findings)
    print(f"prose: {total['word']} words of the list, {total['of']} × Of, {total['long']} long sentences")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
