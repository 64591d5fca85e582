"""``docs/reference/dependencies.md``: what an installation brings, in which tested version, under which licence.

It is read off the environment that this runs in, so that ``python -m docs.dependencies`` wants the tested one:
``pip install -c constraints.txt -e '.[test,deepspeed]'``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "dependencies.md"
EXTRAS = ("lora", "hub", "deepspeed", "tracking", "vllm")
"""Extras of pyproject.toml that users install, without what only the tests or the site need."""
UNPINNED = "any"
HEAD = """<!-- Written by `python -m docs.dependencies` in the tested environment. -->

# Dependencies

What `pip install rayalign` brings, directly or not: the version of `constraints.txt`, with which the tests run, and the
licence that the package itself names. None of the core is under a copyleft licence stronger than the MPL;
`tests/architecture/test_licences.py` sees to that. On a machine with CUDA torch also brings NVIDIA's libraries, under
NVIDIA's own licence, and triton (MIT).

`make audit` asks the Python Package Index for known vulnerabilities of all of them; it needs the network.
"""


def required(name: str, extra: str = "") -> frozenset[str]:
    """The names of ``name`` and of everything that it requires here, directly or not; ``extra`` is one of its own."""
    found: set[str] = set()
    waiting: list[tuple[str, Iterable[str]]] = [(name, (extra,) if extra else ())]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        package, extras = waiting.pop()
        key = (normal(package), tuple(sorted(extras)))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(key[0])
        for requirement in map(Requirement, distribution.requires or ()):
            contexts = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                waiting.append((requirement.name, requirement.extras))
    return frozenset(found)


def is_installed(extra: str) -> bool:
    """Whether everything is there that an extra of ours asks for."""
    asked = [Requirement(text) for text in metadata.requires("rayalign") or ()]
    own = [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": extra})]
    core = {one.name for one in asked if one.marker is None}
    return all(has(one.name) for one in own if one.name not in core)


def has(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def licence(package: str) -> str:
    """As the package names it: an SPDX expression, its classifiers, or the first line of what it wrote."""
    facts: Any = metadata.metadata(package)
    expression = facts.get("License-Expression")
    classified = [text for text in facts.get_all("Classifier") or () if text.startswith("License ::")]
    written = (facts.get("License") or "").partition("\n")[0]
    return expression or ", ".join(text.rpartition(":: ")[2] for text in classified) or written


def pinned() -> Mapping[str, str]:
    """Package → the version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if re.match(r"[\w.-]+==", line))
    return {normal(name): version for name, _, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def page() -> str:
    core = required("rayalign") - {"rayalign"}
    return "\n".join([HEAD, *table("Core", core), *extra_tables(core)])


def extra_tables(core: frozenset[str]) -> Iterator[str]:
    for extra in EXTRAS:
        if is_installed(extra):
            yield from table(f"`rayalign[{extra}]`, besides", required("rayalign", extra) - core - {"rayalign"})
        else:
            yield from (f"## `rayalign[{extra}]`, besides", "", "Not part of the tested environment.", "")


def table(title: str, packages: Iterable[str]) -> Iterator[str]:
    versions = pinned()
    yield from (f"## {title}", "", "| package | version | licence |", "|---|---|---|")
    yield from (f"| {name} | {versions.get(name, UNPINNED)} | {licence(name)} |" for name in sorted(packages))
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page().rstrip() + "\n", encoding="utf-8")
    print(PAGE)
