"""Where rows lie: one entry of ``data.train`` → the files that it names, and which rows of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path

import fsspec

from rayalign.config.suffixes import data_suffix, file_name
from rayalign.data.files import is_web, suffix_of
from rayalign.data.folders import dataset_files
from rayalign.data.records import QUARANTINE
from rayalign.data.tables import count_rows
from rayalign.errors import MissingExtra, UserError, first_line

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(?P<slice>\[.*\])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a person writes to name rows; all but ``path`` concern datasets only."""

    path: str
    config: str | None = None
    data_dir: str | None = None
    data_files: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    revision: str | None = None
    label: str | None = None
    """What tables call it: refused where the dataset has a configuration of that name."""
    max_samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """A file, and of it the rows [first, last); ``last`` None is its end."""

    path: str
    first: int = 0
    last: int | None = None


def find_ranges(origin: Origin) -> tuple[RowRange, ...]:
    """The files that an entry names, in order.

    Raises:
        UserError: there is none, or no such configuration or split; the message says what was looked for.
    """
    parts = [*chain.from_iterable(_parts(origin))]
    if origin.max_samples is not None:
        parts = list(_first_rows(parts, origin.max_samples))
    return tuple(parts)


def _parts(origin: Origin) -> Iterator[Sequence[RowRange]]:
    if is_pattern(origin.path):
        yield [RowRange(path=path) for path in matching_files(origin.path)]
    elif is_file(origin.path):
        suffix_of(origin.path)
        yield [RowRange(path=origin.path)]
    else:
        splits = dataset_files(origin)
        for asked in origin.splits or ("train",):
            for piece in asked.split("+"):
                yield _of_split(origin.path, splits, piece.strip())


def is_pattern(path: str) -> bool:
    """Whether a path stands for those that match it; of a web address a question mark begins its query."""
    marks = "*[" if is_web(path) else "*?["
    return any(mark in path for mark in marks) and ("://" in path or not Path(path).exists())


def is_file(path: str) -> bool:
    if "://" in path:
        return data_suffix(path) is not None
    return Path(path).is_file() or (data_suffix(path) is not None and not Path(path).is_dir())


def matching_files(pattern: str) -> list[str]:
    """The files that match, in order; raises UserError where there is none."""
    if "://" in pattern:
        try:
            system, inside = fsspec.core.url_to_fs(pattern)
            found = [system.unstrip_protocol(path) for path in system.glob(inside)]
        except Exception as error:  # whatever the library of this kind of address raises
            raise UserError(f"{pattern}: cannot be read: {first_line(error)}") from error
    else:
        found = [path for path in glob(pattern, recursive=True) if Path(path).is_file()]
    files = sorted(path for path in found if file_name(path) != QUARANTINE)
    if not files:
        raise UserError(f"no file matches {pattern}{_beside(pattern)}")
    for path in files:
        suffix_of(path)
    return files


def _beside(pattern: str) -> str:
    """What lies in the folder of a local pattern, for its message."""
    folder = Path(pattern).parent
    if "://" in pattern or is_pattern(str(folder)):
        return ""
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"; that folder holds {shown or 'no file'}"


def _of_split(path: str, splits: Mapping[str, Sequence[str]], piece: str) -> list[RowRange]:
    asked = _SPLIT.fullmatch(piece)
    if asked is None or asked["name"] not in splits:
        has = ", ".join(splits)
        raise UserError(f"{path}: there is no split {piece!r}, but {has}; write split: {next(iter(splits))}")
    files = splits[asked["name"]]
    if not asked["slice"]:
        return [RowRange(path=file) for file in files]
    sizes = [count_rows(file) for file in files]
    return list(_window(files, sizes, *_bounds(path, piece, sum(sizes))))


def _bounds(path: str, piece: str, total: int) -> tuple[int, int]:
    """The rows that a slice such as ``train[:10%]`` names, as the ``datasets`` library counts them."""
    try:
        from datasets import ReadInstruction
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    name = piece.partition("[")[0]
    try:
        (found,) = ReadInstruction.from_spec(piece).to_absolute({name: total})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: {piece!r} is no split or slice, such as {name}[:1000] or {name}[90%:]") from error
    return found.from_, found.to


def _window(files: Sequence[str], sizes: Sequence[int], first: int, last: int) -> Iterator[RowRange]:
    """Rows [first, last) of all files one after the other."""
    begin = 0
    for file, size in zip(files, sizes, strict=True):
        own_first, own_last = max(first - begin, 0), min(last - begin, size)
        if own_first < own_last:
            yield RowRange(path=file, first=own_first, last=own_last)
        begin += size


def _first_rows(parts: Sequence[RowRange], count: int) -> Iterator[RowRange]:
    left = count
    for part in parts:
        if not left:
            return
        most = part.first + left
        last = min(most, part.last) if part.last is not None else count_rows(part.path, most=most)
        if part.first < last:
            yield RowRange(path=part.path, first=part.first, last=last)
        left -= max(0, last - part.first)
