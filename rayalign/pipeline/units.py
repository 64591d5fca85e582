"""A source of the configuration → the files and rows that tasks read."""

from __future__ import annotations

from rayalign.config.data import DataConfig, DataSource
from rayalign.data.origin import Origin, Part
from rayalign.data.prepare import Unit


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


def unit_of(part: Part, source: DataSource, data: DataConfig) -> Unit:
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
