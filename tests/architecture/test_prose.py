"""What people read is plain English, and offences are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

import docs.prose as prose

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
WORDS_26 = f"{LONG} 18 19 20 21 22 23 24 25 26"


@pytest.fixture(scope="module")
def rules() -> prose.Rules:
    return prose.load_rules()


def found(name: str, text: str, rules: prose.Rules, folder: Path) -> list[tuple[str, int]]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return [(own.kind, own.line) for own in prose.check(path, rules)]


def test_nothing_is_found() -> None:
    assert prose.main([]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The run goes on.\n", [("word", 1)]),
        ("Title\n\nThe run restarts,\nand nobody waits.\n", [("word", 3)]),
        ("It says `goes on`.\n", []),
        ("```text\nthe run goes on\n```\n", []),
        ("<!-- not run: it goes on -->\n", []),
        ("| a | the run goes on |\n", [("word", 1)]),
        (f"{WORDS_26}.\n", [("long", 1)]),
        (f"{WORDS_26.removesuffix(' 26')}.\n", []),
        (f"- {LONG}.\n- {LONG}.\n", []),
        (f"{LONG}. {LONG.capitalize()}.\n", []),
        (f"{LONG}.\nTwo {LONG}.\n", []),
        (f"{LONG}. `code {LONG}` {LONG}.\n", []),
        (f"{LONG}, i. e. {LONG}.\n", [("long", 1)]),
        ("<h2>Table</h2>\n<p>The run goes on.</p>\n", [("word", 1)]),
        (f"<h2>{LONG}</h2>\n<p>{LONG}</p>\n", []),
        (f"<p>{LONG} {{{{ value }}}} 19 20 21 22 23 24 25 26</p>\n", [("long", 1)]),
        (f"<p>{LONG} {{{{ value if value else 'none of these' }}}}</p>\n", []),
        ("Rows are so.\n", [("word", 1)]),
        ("Rows are so long that they end.\n", []),
    ],
)
def test_offences_on_a_page_are_seen(
    text: str, expected: list[tuple[str, int]], rules: prose.Rules, tmp_path: Path
) -> None:
    assert found("page.md", text, rules, tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""Of each."""\n', [("of", 1)]),
        ('"""Often enough."""\n', []),
        ('x = 1\n"""Of the run."""\n', [("of", 2)]),
        ('def f():\n    """A sum.\n\n    Of all.\n    """\n', []),
        ('print("nobody waits for it")\n', [("word", 1)]),
        ('print(f"{x} goes on from there {y}")\n', [("word", 1)]),
        ('print("nobody")\n', []),
        ("x = 1  # whoever calls\n", [("word", 1)]),
        (f'"""{WORDS_26}."""\n', [("long", 1)]),
        (f'print("{WORDS_26}")\n', []),
    ],
)
def test_offences_in_a_module_are_seen(
    text: str, expected: list[tuple[str, int]], rules: prose.Rules, tmp_path: Path
) -> None:
    assert found("module.py", text, rules, tmp_path) == expected
