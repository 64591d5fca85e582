"""Under which licences everything comes that ``pip install rayalign`` brings, and the page that says so."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from docs.dependencies import PAGE, UNPINNED, licence, normal, pinned, required

COPYLEFT = re.compile(r"\b(A|L)?GPL|GNU|SSPL|EUPL|Commons Clause", re.I)


@pytest.fixture(scope="module")
def core() -> frozenset[str]:
    return required("rayalign") - {"rayalign"}


@pytest.fixture(scope="module")
def sections() -> dict[str, dict[str, tuple[str, str]]]:
    """Title → package → (version, licence), as the page has them."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found[line.removeprefix("## ")] = {}
        elif match := re.fullmatch(r"\| (\S+) \| (\S+) \| (.*) \|", line):
            rows[match[1]] = (match[2], match[3])
    return {title: {name: row for name, row in rows.items() if name != "package"} for title, rows in found.items()}


def test_every_dependency_names_a_licence_that_fits_ours(core: frozenset[str]) -> None:
    assert {"torch", "ray", "transformers", "pydantic"} <= core
    found = {package: licence(package) for package in core}
    assert {package: text for package, text in found.items() if not text or COPYLEFT.search(text)} == {}


@pytest.mark.parametrize(
    ("text", "strong"), [("LGPL-2.1", True), ("GNU General Public License v3", True), ("MPL-2.0", False)]
)
def test_copyleft_is_seen(text: str, strong: bool) -> None:
    assert bool(COPYLEFT.search(text)) is strong


def test_the_page_has_the_tested_versions(sections: dict[str, dict[str, tuple[str, str]]]) -> None:
    versions = pinned()
    rows = {name: row for section in sections.values() for name, row in section.items()}
    assert {name: version for name, (version, _) in rows.items() if version != versions.get(name, UNPINNED)} == {}


def test_the_page_names_the_core_and_its_licences(
    core: frozenset[str], sections: dict[str, dict[str, tuple[str, str]]]
) -> None:
    """Where an installed version is the tested one; others may require and say something else."""
    written, versions = sections["Core"], pinned()
    same = {name for name in core if metadata.version(name).partition("+")[0] == versions.get(name)}
    assert len(same) > 50, "install with -c constraints.txt"
    assert same <= written.keys(), "run: python -m docs.dependencies"
    assert {name: written[name][1] for name in same} == {name: licence(name) for name in same}


def test_direct_dependencies_are_there(sections: dict[str, dict[str, tuple[str, str]]]) -> None:
    direct = {
        normal(re.split(r"[^\w.-]", text)[0]) for text in metadata.requires("rayalign") or () if "extra ==" not in text
    }
    assert direct <= sections["Core"].keys()
