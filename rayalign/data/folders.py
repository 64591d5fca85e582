"""Datasets as files: a folder, what ``save_to_disk`` wrote, or a dataset of the Hub at one commit.

The ``datasets`` library says which files belong to which configuration and split. Each file is read by itself, so that
files of unequal columns do not meet in one table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from rayalign.config.suffixes import READ, data_suffix, file_name
from rayalign.data.files import suffix_of
from rayalign.data.hub import hub_folder
from rayalign.data.records import QUARANTINE
from rayalign.errors import MissingExtra, UserError, first_line

if TYPE_CHECKING:
    from rayalign.data.origin import Origin

Splits = Mapping[str, Sequence[str]]
SAVED = "state.json"
SAVED_SPLITS = "dataset_dict.json"
_SHARD = re.compile(r"(?P<name>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<rest>\..*)")


def dataset_files(origin: Origin) -> Splits:
    """Split → files of a dataset.

    Raises:
        UserError: there is no such dataset or configuration, it holds no file of rows, or a part of it is missing.
        MissingExtra: the ``datasets`` library is needed and not installed.
    """
    folder = origin.path.rstrip("/")
    is_remote = "://" in folder
    if not is_remote and not Path(folder).is_dir():
        _refuse_reader(origin)
        folder = hub_folder(origin.path, origin.revision)
    elif origin.revision is not None:
        raise UserError(f"{origin.path}: revision is of a dataset on the Hub, and this is a folder; remove it")
    saved = saved_splits(folder)
    if saved:
        return _single(saved, origin)
    found = _listed(folder, origin)
    for path in chain.from_iterable(found.values()) if origin.data_files else ():
        suffix_of(path)  # what was named is not left out
    splits = {split: tuple(filter(data_suffix, files)) for split, files in found.items()}
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise UserError(f"{origin.path}: there is no file of rows in it; rows are read from {READ}")
    for files in splits.values():
        refuse_missing_shards(files)
    return splits


def _refuse_files_of_no_split(folder: str, splits: Splits) -> None:
    """Where a folder's files have names of splits, one with another name would not be read, without a word."""
    read = {Path(path).resolve() for path in chain.from_iterable(splits.values())}
    names = (path.relative_to(folder) for path in sorted(Path(folder).rglob("*")) if path.resolve() not in read)
    left = next((name for name in names if _is_of_rows(name) and (folder / name).is_file()), None)
    if left is not None:
        raise UserError(
            f"{folder}: {left} is of no split, but other files are named as {', '.join(splits)}; write split: "
            f"{next(iter(splits))} to leave it out, or name files in data_files"
        )


def _is_of_rows(name: Path) -> bool:
    is_hidden = any(part.startswith((".", "__")) for part in name.parts)
    return not is_hidden and data_suffix(name.name) is not None and name.name not in _BESIDE


_BESIDE = frozenset({QUARANTINE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"})
"""Files beside rows that look like some."""


def _refuse_reader(origin: Origin) -> None:
    if origin.path in ("json", "csv", "parquet", "arrow") and origin.data_files:
        raise UserError(
            f"path: {origin.path} names a reader, and files are read by their endings; write path: "
            f"{origin.data_files[0]}"
        )


def _single(saved: Splits, origin: Origin) -> Splits:
    """A saved dataset has neither configurations nor further files."""
    for name in ("config", "data_dir", "data_files"):
        if getattr(origin, name):
            raise UserError(f"{origin.path}: was written by save_to_disk and has no {name}; remove it")
    return saved


def saved_splits(folder: str) -> Splits:
    """The files of a dataset that ``save_to_disk`` wrote, a single one as ``train``; nothing for any other folder."""
    splits = _read_json(f"{folder}/{SAVED_SPLITS}")
    if splits is not None:
        return {name: _saved_files(f"{folder}/{name}") for name in splits.get("splits", ())}
    return {"train": _saved_files(folder)} if _read_json(f"{folder}/{SAVED}") is not None else {}


def _saved_files(folder: str) -> tuple[str, ...]:
    state = _read_json(f"{folder}/{SAVED}")
    if state is None:
        raise UserError(f"{folder}: {SAVED} is missing; save the dataset again")
    return tuple(f"{folder}/{file['filename']}" for file in state["_data_files"])


def _read_json(path: str) -> Any:
    """None where there is no such file."""
    text = _read_text(path)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _read_text(path: str) -> str | None:
    try:
        with fsspec.open(path, "rb") as stream:
            return str(stream.read().decode("utf-8"))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever the library of this kind of address raises
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


def _listed(folder: str, origin: Origin) -> Splits:
    """Split → files, as the ``datasets`` library would group them."""
    try:
        from datasets.data_files import get_data_patterns, sanitize_patterns
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    below = f"{folder}/{origin.data_dir.strip('/')}" if origin.data_dir else folder
    configuration = _configuration(folder, origin)
    try:
        if origin.data_files:
            patterns = sanitize_patterns(list(origin.data_files))
        elif configuration is not None and "data_files" in configuration:
            patterns = sanitize_patterns(configuration["data_files"])
        else:
            if configuration is not None and configuration.get("data_dir"):
                below = f"{folder}/{configuration['data_dir']}"
            patterns = get_data_patterns(below)
        found = {str(split): _matched(own, below) for split, own in patterns.items()}
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{origin.path}: {first_line(error)}{_remedy(folder)}") from error
    is_own = Path(origin.path).is_dir()
    if is_own and configuration is None and not origin.data_files and not origin.splits:
        _refuse_files_of_no_split(below, found)
    return found


def _remedy(folder: str) -> str:
    if not folder.startswith("hf://"):
        return ""
    return "; of many datasets the Hub keeps Parquet files: write revision: refs/convert/parquet"


def _matched(patterns: Sequence[str], folder: str) -> tuple[str, ...]:
    from datasets.data_files import resolve_pattern

    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            found |= dict.fromkeys(sorted(resolve_pattern(pattern, base_path=folder)))
        except FileNotFoundError:
            if not any(mark in pattern for mark in "*?["):
                raise
    return tuple(path for path in found if file_name(path) != QUARANTINE)


def _configuration(folder: str, origin: Origin) -> Mapping[str, Any] | None:
    """What the dataset's card says of the configuration that is meant; None where its card names none."""
    configurations = _configurations(folder, origin.path)
    if origin.label in configurations and origin.config is None:
        raise UserError(
            f"{origin.path}: name is what tables call these rows, and the dataset has a configuration of that name; "
            f"write config: {origin.label}"
        )
    if origin.config is not None:
        if origin.config not in configurations:
            has = ", ".join(configurations) or "none; its folders are named by data_dir"
            raise UserError(f"{origin.path}: there is no configuration {origin.config!r}, but {has}")
        return configurations[origin.config]
    if origin.data_files or origin.data_dir or not configurations:
        return None
    default = [name for name, own in configurations.items() if own.get("default") or name == "default"]
    if len(configurations) > 1 and not default:
        names = list(configurations)
        raise UserError(f"{origin.path}: has the configurations {', '.join(names)}; write config: {names[0]}")
    return configurations[default[0] if default else next(iter(configurations))]


def _configurations(folder: str, path: str) -> Mapping[str, Mapping[str, Any]]:
    """The ``configs`` of a dataset card."""
    card = _read_text(f"{folder}/README.md")
    if card is None:
        return {}
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        found: Mapping[str, Mapping[str, Any]] = MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
    except ValueError as error:
        raise UserError(f"{path}: its README.md cannot be used: {first_line(error)}") from error
    return found


def refuse_missing_shards(files: Sequence[str]) -> None:
    """Raise UserError where one of several files of a split is not there, as after a download that broke off."""
    shards: dict[tuple[str, int, str], set[int]] = {}
    for path in files:
        if found := _SHARD.fullmatch(path):
            shards.setdefault((found["name"], int(found["count"]), found["rest"]), set()).add(int(found["index"]))
    for (name, count, rest), held in shards.items():
        missing = sorted({*range(count)} - held)
        if missing:
            raise UserError(f"{name}-{missing[0]:05d}-of-{count:05d}{rest} is missing; fetch the dataset again")
