"""What a YAML may say. Importing this room loads no torch; reading a file imports the method that it names."""

from __future__ import annotations

from rayalign.config.compare import Cell, Comparison, load_compare, started_from
from rayalign.config.dump import diff, dump, to_yaml
from rayalign.config.errors import ConfigError
from rayalign.config.load import load_run
from rayalign.config.run import RunConfig

__all__ = [
    "Cell",
    "Comparison",
    "ConfigError",
    "RunConfig",
    "diff",
    "dump",
    "load_compare",
    "load_run",
    "started_from",
    "to_yaml",
]
