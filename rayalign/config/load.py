"""YAML and command line → RunConfig, and back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from rayalign.config.carry import carry_settings
from rayalign.config.document import COMMAND_LINE, Document, Place, apply_overrides, credentials, read_document
from rayalign.config.errors import ConfigError, Problem
from rayalign.config.explain import explain
from rayalign.config.run import RunConfig


def load_run(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that the YAML at ``path`` describes, with every ``optim.lr=1e-6`` of ``overrides`` applied.

    Without a path everything comes from the overrides. Inputs resolve against the YAML's folder (without one, the
    current folder); ``storage_path`` stays as written.

    Raises:
        ConfigError: with every mistake found, one per line.
    """
    document = read_overridden(path, overrides)
    if "grid" in document.data:
        raise ConfigError([Problem(str(path), "", f"is a comparison; start it with: rayalign compare {path}")])
    leaked = credentials(document)
    if leaked:
        raise ConfigError(leaked)
    return parse_run(document)


def read_overridden(path: str | Path | None, overrides: Iterable[str]) -> Document:
    """The YAML at ``path``, or nothing, with the settings of the command line.

    A block that is named again keeps the settings that hold under its new name.
    """
    document = empty_document() if path is None else read_document(path)
    with importable(document.directory):
        return apply_overrides(document, overrides, replaced=carry_settings)


def parse_run(document: Document) -> RunConfig:
    """The run that ``document`` describes; raises ConfigError like :func:`load_run`."""
    try:
        with importable(document.directory):
            return RunConfig.model_validate(document.data, context={"directory": document.directory})
    except ValidationError as error:
        raise ConfigError(explain(error, document, model=RunConfig)) from None


@contextlib.contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Modules beside the YAML can be imported, as those beside a script can."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def empty_document() -> Document:
    """A document without keys, in the current folder."""
    return Document(data={}, places={(): Place(COMMAND_LINE)}, directory=Path.cwd())
