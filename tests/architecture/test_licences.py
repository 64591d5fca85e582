"""Under which licences everything comes that ``pip install rayalign`` brings. As a program it prints the list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement

COPYLEFT = re.compile(r"\b(A|L)?GPL|GNU|SSPL|EUPL|Commons Clause", re.I)


def licences(name: str) -> dict[str, str]:
    """Package → licence, for ``name`` and what it requires here, directly or not, without its own extras."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, Iterable[str]]] = [(name, ())]
    while waiting:
        package, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", package).lower()
        if key in found:
            continue
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found[key] = licence(distribution.metadata)
        for requirement in map(Requirement, distribution.requires or ()):
            contexts = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                waiting.append((requirement.name, requirement.extras))
    return dict(sorted(found.items()))


def licence(facts: metadata.PackageMetadata) -> str:
    expression = facts.get("License-Expression")
    classified = [text for text in facts.get_all("Classifier") or () if text.startswith("License ::")]
    written = (facts.get("License") or "").partition("\n")[0]
    return expression or ", ".join(text.rpartition(":: ")[2] for text in classified) or written


def test_every_dependency_names_a_licence_that_fits_ours() -> None:
    found = licences("rayalign")
    assert {"torch", "ray", "transformers", "pydantic"} <= set(found)
    assert {package: text for package, text in found.items() if not text or COPYLEFT.search(text)} == {}


if __name__ == "__main__":
    for package, text in licences("rayalign").items():
        print(f"{package:36} {text}")
