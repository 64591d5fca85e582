"""Dockerfiles as text: pinned, unprivileged, small. (No image is built here.)"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
FILES = sorted((REPOSITORY / "cluster" / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(path: Path, wanted: str) -> list[str]:
    return [rest for word, rest in instructions(path) if word == wanted]


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_base_is_pinned(path: Path) -> None:
    defaults = dict(rest.split("=", 1) for rest in arguments(path, "ARG") if "=" in rest)
    for base in arguments(path, "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base.split()[0])
        assert re.search(r":\d+\.\d+\.\d+-|@sha256:[0-9a-f]{64}$", image), image
        assert "latest" not in image


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_last_user_is_not_root(path: Path) -> None:
    words = instructions(path)
    last_stage = max(index for index, (word, _) in enumerate(words) if word == "FROM")
    users = [rest for word, rest in words[last_stage:] if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])  # a number, so that runAsNonRoot can tell


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_stays_small_and_has_no_secret(path: Path) -> None:
    for command in arguments(path, "RUN"):
        if "apt-get install" in command:
            assert "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command
        assert not re.search(r"curl[^|]*\|\s*(ba)?sh|sudo|--break-system-packages", command)
    assert any("PIP_NO_CACHE_DIR=1" in rest for rest in arguments(path, "ENV"))
    assert arguments(path, "ADD") == []
    assert not re.search(r"(TOKEN|PASSWORD|SECRET)\s*=", " ".join(arguments(path, "ENV") + arguments(path, "ARG")))
    assert len(arguments(path, "FROM")) == 2  # compilers and pip's leftovers stay in the first stage


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_installed_is_declared_and_constrained(path: Path) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = (command for command in arguments(path, "RUN") if "pip install" in command)
    assert "--constraint" in install
    named = re.search(r"'\.\[([\w,-]+)\]'", install)
    assert named and set(named[1].split(",")) <= set(extras)
    for pinned in re.findall(r"(\S+)==(\S+)", install.partition("pip install")[2]):
        assert "==".join(pinned) in (REPOSITORY / "constraints.txt").read_text(), pinned


def test_the_context_is_an_allow_list() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((REPOSITORY / name).exists() for name in allowed)
    assert {"pyproject.toml", "constraints.txt", "rayalign"} <= set(allowed)
    assert not {".git", "tests", "runs", ".env"} & set(allowed)
