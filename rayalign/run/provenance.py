"""Which software made a result."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

from rayalign import __version__

LIBRARIES = ("torch", "transformers", "ray", "numpy", "tokenizers", "safetensors")


def provenance() -> dict[str, Any]:
    """Versions of libraries and the git revision of the current folder, where it has one."""
    versions = {"rayalign": __version__, "python": sys.version.split()[0]}
    versions |= {name: metadata.version(name) for name in LIBRARIES}
    return {"versions": versions, "git_revision": git_revision()}


def git_revision() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
