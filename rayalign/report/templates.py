"""The templates of this room: Jinja with the filters of :mod:`rayalign.report.formatting`."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayalign.report import formatting


def environment() -> Environment:
    """Templates of ``rayalign/report``; HTML is escaped, and a name without a value raises."""
    made = Environment(
        loader=PackageLoader("rayalign", "report"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= formatting.FILTERS
    made.filters["kept"] = lambda filtered: formatting.filter_sentence(**filtered.model_dump())
    return made
