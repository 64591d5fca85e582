"""Types of single fields: paths that resolve against the YAML's folder, functions by name, counts.

The folder reaches the validators as ``context={"directory": Path}``; without it every path stays as written.
Dumped with ``context={"portable": True}`` a path is its last part: what it holds is what counts, not where it lies.
"""

from __future__ import annotations

import os
import re
import stat
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
    model_validator,
)

from rayalign.config.suffixes import data_suffix
from rayalign.methods._fields import refuse_odd_numbers

OBJECT_STORES = ("s3://", "gs://", "file://")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_FUNCTION = re.compile(r"(?:[A-Za-z_][\w.]*|[^:]+\.py):[A-Za-z_][\w.]*")


class OnResume(Enum):
    """What happens when a run that has checkpoints is started with another value: see :mod:`rayalign.config.resume`."""

    MAY_CHANGE = "the run resumes: results stay, up to rounding"
    BY_CONTENT = "the run resumes if what is read stays"


MAY_CHANGE, BY_CONTENT = OnResume.MAY_CHANGE, OnResume.BY_CONTENT


class Block(BaseModel):
    """A block of the YAML: unknown keys are errors and nothing changes after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, data: Any) -> Any:
        return refuse_odd_numbers(cls, data)

    def unused(self) -> frozenset[str]:
        """Settings that the others of this block leave without use."""
        return frozenset()

    def given_without_use(self) -> list[str]:
        """Those of them that are not at their defaults."""
        fields = type(self).model_fields
        return sorted(key for key in self.unused() if getattr(self, key) != fields[key].default)


def as_named(value: object) -> object:
    """``dpo`` is short for ``{name: dpo}``; a boolean is kept as a name, so that the error can explain it."""
    return {"name": value} if isinstance(value, str | bool) else value


def as_list(value: object) -> object:
    """One value stands for a list of one."""
    return [value] if isinstance(value, str | dict) else value


def _directory(info: ValidationInfo) -> Path | None:
    return (info.context or {}).get("directory")


def _beside(directory: Path, value: str) -> str:
    """The absolute path; raises ValueError where it leads nowhere."""
    try:
        return str((directory / Path(value).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{value!r} is no path: {error}") from error


def _exists(path: Path, *, folder: bool = False) -> bool:
    """Whether something is there, or a folder; what may not be looked at is."""
    try:
        return stat.S_ISDIR(path.stat().st_mode) or not folder
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def _is_explicit_path(value: str) -> bool:
    return value.startswith(("/", "./", "../", "~"))


def _resolve_path(value: str, info: ValidationInfo) -> str:
    directory = _directory(info)
    return value if directory is None or _URI.match(value) else _beside(directory, value)


def _resolve_interpreter(value: str, info: ValidationInfo) -> str:
    """Its links stay as they are: the interpreter of a virtual environment is one, and says which environment."""
    directory = _directory(info)
    if directory is None:
        return value
    try:
        return os.path.normpath(directory / Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{value!r} is no path: {error}") from error


def _resolve_data(value: str, info: ValidationInfo) -> str:
    """A file where it looks like one or exists, else the name of a dataset on the hub."""
    directory = _directory(info)
    if directory is None or _URI.match(value):
        return value
    is_pattern = any(mark in value for mark in "*?[")
    is_file = _is_explicit_path(value) or is_pattern or data_suffix(value) is not None or _exists(directory / value)
    if _FUNCTION.fullmatch(value) and not _exists(directory / value):
        advice = f"write {{function: {value!r}}} for a maker of rows, or {{path: …, split: …}} for a dataset's split"
        raise ValueError(f"{value!r} is no file or dataset; {advice}")
    return _beside(directory, value) if is_file else value


def resolve_model(value: str, info: ValidationInfo) -> str:
    """A folder where it looks like one or exists, else the name of a model on the hub."""
    directory = _directory(info)
    if directory is None or _URI.match(value):
        return value
    return _beside(directory, value) if _is_explicit_path(value) or _exists(directory / value, folder=True) else value


def check_function(value: str, info: ValidationInfo) -> str:
    """``module:callable``, found on the Python path or beside the YAML, or ``path/to/file.py:callable``."""
    if not _FUNCTION.fullmatch(value):
        raise ValueError(f"{value!r} names no function; write module:callable, such as my_rewards:helpful")
    place, _, name = value.rpartition(":")
    return f"{_resolve_path(place, info)}:{name}" if place.endswith(".py") else value


def _resolve_template(value: str, info: ValidationInfo) -> str:
    return value if value in ("auto", "none") else _resolve_path(value, info)


def _parse_count(value: object) -> object:
    """4 | [2, 8] | auto."""
    if value == "auto":
        return value
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{value} is less than 1; write at least 1, [smallest, largest] or auto")
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(bound) is int for bound in value):
        low, high = value
        if 0 <= low <= high and high >= 1:
            return (low, high)
        raise ValueError(f"[{low}, {high}] is no range: write [smallest, largest]")
    raise ValueError(f"{value!r} is neither a number, [smallest, largest] nor auto")


def without_folder(value: str) -> str:
    """The last part of an absolute path, or of one on an object store; any other value as it is."""
    return Path(value).name if Path(value).is_absolute() or value.startswith(OBJECT_STORES) else value


def _dump_path(value: str, info: SerializationInfo) -> str:
    return without_folder(value) if (info.context or {}).get("portable") else value


AS_PATH = PlainSerializer(_dump_path)
"""Says of a text that it may be a path."""

InputPath = Annotated[str, AfterValidator(_resolve_path), AS_PATH]
InterpreterPath = Annotated[str, AfterValidator(_resolve_interpreter)]
DataPath = Annotated[str, AfterValidator(_resolve_data), AS_PATH]
ModelPath = Annotated[str, AfterValidator(resolve_model), AS_PATH]
TemplatePath = Annotated[str, AfterValidator(_resolve_template), AS_PATH]
FunctionName = Annotated[str, AfterValidator(check_function), AS_PATH]
Elastic = Annotated[int | tuple[int, int] | Literal["auto"], BeforeValidator(_parse_count)]
"""A fixed number, [smallest, largest], or ``auto``."""
