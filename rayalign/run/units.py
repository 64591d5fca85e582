"""A source of the configuration → the files and rows that tasks read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayalign.config.data import DataConfig, DataSource
from rayalign.data.origin import Origin, RowRange
from rayalign.data.tokenize_rows import Unit
from rayalign.errors import UserError, first_line


def origin_of(source: DataSource) -> Origin:
    """What an entry with a path names."""
    return Origin(
        path=str(source.path),
        config=source.config,
        data_dir=source.data_dir,
        data_files=source.data_files,
        splits=source.split or (),
        revision=source.revision,
        label=source.name,
        max_samples=source.max_samples,
    )


def unit_of(part: RowRange, source: DataSource, data: DataConfig) -> Unit:
    """One file, read as ``source`` and ``data`` say."""
    system = data.system if source.system is None else source.system
    return Unit(
        path=part.path,
        first=part.first,
        last=part.last,
        format=source.format or data.format,
        columns=source.columns,
        system=system or None,
        template_kwargs=source.chat_template_kwargs,
    )


def rows_made(name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[Any]:
    """What the user's maker of rows yields; raises UserError for what it raises, and where it yields nothing."""
    count = 0
    try:
        for row in make(**arguments):
            count += 1
            yield row
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise UserError(f"{name!r}: row {count + 1}: {type(error).__name__}: {first_line(error)}") from error
    if not count:
        raise UserError(f"{name!r} made no row")
