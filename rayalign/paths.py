"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from rayalign.errors import UserError


def expanded(path: str | Path, *, field: str) -> Path:
    """``path`` with ``~`` and ``~user`` replaced; raises UserError, naming ``field``, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{field}: {path} leads nowhere: {error}") from error
