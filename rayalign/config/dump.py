"""A resolved configuration as plain values: what ``run.json`` records, and how two runs differ."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from rayalign.config.document import document_leaves
from rayalign.config.errors import dotted
from rayalign.config.run import RunConfig

REDACTED = "(redacted)"
_SECRET = re.compile(
    r"(^|[_-]|(?-i:(?<=[a-z])(?=[A-Z])))"
    r"(token|secret|password|passwd|credentials?|(api|access|private|secret)[_-]?key|authorization|cookie)$",
    re.I,
)


class ChangedSetting(NamedTuple):
    """One field in which two runs differ; None where a run does not have it."""

    field: str
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.left} → {self.right}"


def dump(run: RunConfig, *, portable: bool = False) -> dict[str, Any]:
    """Every setting, defaults included, as values for JSON or YAML; secrets are redacted.

    Without secrets ``RunConfig.model_validate(dump(run)) == run``. With ``portable`` paths are their last parts, so
    that a copy of the folder in another place gives the same values.
    """
    redacted: dict[str, Any] = redact(run.model_dump(mode="json", exclude_none=True, context={"portable": portable}))
    return redacted


def to_yaml(run: RunConfig) -> str:
    """:func:`dump` as a YAML file that :func:`rayalign.config.load_run` reads."""
    return yaml.safe_dump(dump(run), sort_keys=False)


def diff(left: RunConfig, right: RunConfig) -> list[ChangedSetting]:
    """The fields in which two runs differ, in the order of the schema."""
    mine, theirs = (dict(document_leaves(dump(run))) for run in (left, right))
    return [
        ChangedSetting(dotted(path), mine.get(path), theirs.get(path))
        for path in dict.fromkeys([*mine, *theirs])
        if mine.get(path) != theirs.get(path)
    ]


def redact(value: Any) -> Any:
    """``value`` with every text redacted that stands under a key such as ``api_key`` or ``hf_token``."""
    if isinstance(value, dict):
        secret = {key for key, item in value.items() if isinstance(item, str) and _SECRET.search(key)}
        return {key: redact(item) for key, item in value.items()} | dict.fromkeys(secret, REDACTED)
    return [redact(item) for item in value] if isinstance(value, list) else value


def redacted_setting(text: str) -> str:
    """A setting of the command line, ``optim.lr=1e-6``, as it may be recorded."""
    key, equals, value = text.partition("=")
    if equals and _SECRET.search(key.rpartition(".")[2]):
        return f"{key}={REDACTED}"
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:
        return text
    shown = redact(given)
    return text if shown == given else f"{key}={yaml.safe_dump(shown, default_flow_style=True).strip()}"
