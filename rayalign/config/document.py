"""YAML with the place of every key, and dotted overrides from the command line on top of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rayalign.config.errors import ConfigError, FieldPath, Problem, dotted

COMMAND_LINE = "command line"
_PART = re.compile(r"(?P<key>[^\[\]]*)(?P<items>(?:\[\d+\])*)")
_ITEM = re.compile(r"\d+")
SHORT = {
    **dict.fromkeys(("method", "weighting", "data_policy", "label", "strategy", "scorer", "scorers", "judge"), "name"),
    **dict.fromkeys(("train", "eval", "prompts"), "path"),
    "diagnostics": "name",
}
"""Keys whose value may be a text, and which key of the block it stands for."""
_CREDENTIALS = re.compile(
    r"://[^/@\s]*:[^/@\s]*@"
    r"|https?://[^/@\s]+@"
    r"|://\S*[?&;#](?:[\w.-]*(?:token|secret|password|passwd|key|signature|credential)|sig|auth)=",
    re.IGNORECASE,
)
"""A password, a token as the user's name, or a signed address, wherever in a text: fsspec chains addresses."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written."""

    where: str
    """``run.yaml:12`` or ``command line``."""
    order: int = 0
    text: str | None = None
    """A scalar as it was written: YAML reads ``off`` as false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Plain values and the place of each."""

    data: Any
    places: Mapping[FieldPath, Place] = field(default_factory=dict)
    directory: Path
    """Relative inputs resolve against it."""

    def get(self, path: FieldPath) -> Any:
        """The value at ``path``; None where there is none."""
        value = self.data
        for part in path:
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def place(self, path: FieldPath) -> Place:
        """The place of ``path``, or of the nearest thing around it."""
        if path in self.places:
            return self.places[path]
        for length in range(len(path) - 1, -1, -1):
            if path[:length] in self.places:
                return replace(self.places[path[:length]], text=None)
        return Place(COMMAND_LINE)

    def part(self, path: FieldPath) -> Document:
        """The document below ``path``."""
        depth = len(path)
        places = {place[depth:]: value for place, value in self.places.items() if place[:depth] == path}
        return replace(self, data=self.get(path), places=places)


def read_document(path: str | Path) -> Document:
    """The YAML file at ``path``.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or writes a key twice.
    """
    name = str(path)
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        reader = _Reader(name)
        data = {} if node is None else reader.read(node, ())
    except OSError as error:
        raise ConfigError([Problem(name, "", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise ConfigError([Problem(name, "", "is not text in UTF-8; save it as UTF-8")]) from None
    except RecursionError:
        raise ConfigError([Problem(name, "", "is nested too deeply")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigError([Problem(where, "", f"is not valid YAML: {error.problem}")]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([Problem(name, "", f"is not valid YAML: {error}")]) from None
    if not isinstance(data, dict):
        reader.problems.append(Problem(name, "", "holds no keys; write name: value, one per line"))
    if reader.problems:
        raise ConfigError(reader.problems)
    return Document(data=data, places=reader.places, directory=Path(path).resolve().parent)


class _Reader:
    """Builds plain values from YAML nodes and notes the line of each; duplicates become problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[FieldPath, Place] = {(): Place(name)}
        self.problems: list[Problem] = []
        self._constructor = yaml.constructor.SafeConstructor()
        self._open: list[yaml.Node] = []

    def read(self, node: yaml.Node, path: FieldPath) -> Any:
        if any(node is ancestor for ancestor in self._open):
            self._problem(node, path, "an alias refers to the block that contains it; remove it")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(item, item, (*path, index)) for index, item in enumerate(node.value)]
            return self._constructor.construct_object(node)
        except ValueError as error:
            self._problem(node, path, f"is no value of YAML: {error}; quote it if it is text")
            return None
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, path, "has a list or a block as a key; write name: value")
                return {}
            key = key_node.value
            if key in first_line and key != "<<":
                self._problem(key_node, (*path, key), f"written twice, first in line {first_line[key]}; remove one")
            first_line.setdefault(key, key_node.start_mark.line + 1)
        self._constructor.flatten_mapping(node)
        values = {}
        for key_node, value_node in node.value:
            key = self._constructor.construct_object(key_node)
            if not isinstance(key, str):
                self._problem(key_node, (*path, key_node.value), "is no text in YAML; quote the key")
                continue
            values[key] = self._item(key_node, value_node, (*path, key))
        return values

    def _item(self, marked: yaml.Node, node: yaml.Node, path: FieldPath) -> Any:
        line = marked.start_mark.line + 1
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.places[path] = Place(f"{self.name}:{line}", line, text)
        return self.read(node, path)

    def _problem(self, node: yaml.Node, path: FieldPath, message: str) -> None:
        self.problems.append(Problem(f"{self.name}:{node.start_mark.line + 1}", dotted(path), message))


Replace = Callable[[str, Any, Any], Any]
"""(block, its value before, the value given for it as a whole) → the value that it gets."""


def apply_overrides(
    document: Document, overrides: Iterable[str], *, replaced: Replace = lambda block, before, given: given
) -> Document:
    """``document`` with every ``optim.lr=1e-6`` applied; values are YAML.

    What is given of a block is applied after what is given as the block, whatever stands first; of two values for one
    key the last one holds.

    Raises:
        ConfigError: an override is not ``key=value``, or its key leads through a value that has no keys.
    """
    given, problems = _parsed(overrides, 1 + max((place.order for place in document.places.values()), default=0))
    data, places = _copied(document.data), dict(document.places)
    for one in sorted(given, key=lambda one: len(one.keys)):
        block, value = str(one.keys[0]), one.value
        if len(one.keys) == 1:
            value = replaced(block, data.get(block), value)
        try:
            path = assign(data, one.keys, value)
        except ValueError as error:
            problems[one.place.order] = Problem(COMMAND_LINE, one.text, str(error))
            continue
        places = {at: place for at, place in places.items() if at[: len(path)] != path}
        around = {path[:length]: replace(one.place, text=None) for length in range(1, len(path))}
        places = {**around, **places, path: one.place}
    if problems:
        raise ConfigError(problems[order] for order in sorted(problems))
    return replace(document, data=data, places=places)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Override:
    """One ``key=value`` of the command line."""

    text: str
    """The key as it was written."""
    keys: list[str | int]
    value: Any
    place: Place


def _parsed(overrides: Iterable[str], order: int) -> tuple[list[_Override], dict[int, Problem]]:
    """The overrides, and by their order what is wrong with those that are none."""
    found, problems = [], {}
    for number, text in enumerate(overrides, start=order):
        key, equals, written = text.partition("=")
        try:
            if not equals or not key.strip():
                raise ValueError("is not key=value, such as optim.lr=1e-6")
            place = Place(COMMAND_LINE, number, written)
            found.append(_Override(text=key, keys=keys_of(key.strip()), value=yaml.safe_load(written), place=place))
        except yaml.YAMLError:
            problems[number] = Problem(COMMAND_LINE, key, f"{written!r} is not valid YAML; quote it")
        except ValueError as error:
            problems[number] = Problem(COMMAND_LINE, key, str(error))
    return found, problems


def keys_of(text: str) -> list[str | int]:
    """``data.train[0].path`` → its parts; raises ValueError for what is no such key."""
    found: list[str | int] = []
    for part in text.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no key; items of a list are counted from 0, as in data.train[0].path")
        found += [match["key"], *map(int, _ITEM.findall(match["items"]))]
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def assign(data: dict[str, Any], keys: Sequence[str | int], value: Any) -> FieldPath:
    """Put ``value`` at ``keys``, making the blocks on the way; list items are counted from 0.

    A text that stands for a block (:data:`SHORT`) becomes that block, and a single item the list that it stands for.
    Returns the path. Raises ValueError where ``keys`` leads through a value that has no keys.
    """
    container: Any = data
    path: list[str | int] = []
    for position, key in enumerate(keys):
        part: Any = key
        if isinstance(container, list):
            part = _item(container, key, tuple(path))
        elif not isinstance(container, dict):
            raise ValueError(f"{dotted(tuple(path))} is {container!r}, which has no keys; override it as a whole")
        path.append(part)
        if position == len(keys) - 1:
            container[part] = value
        else:
            current = container[part] if isinstance(container, list) else container.get(part)
            container[part] = _opened(current, tuple(path), keys[position + 1])
            container = container[part]
    return tuple(path)


def _item(items: Sequence[Any], key: str | int, path: FieldPath) -> int:
    if not (isinstance(key, int) or key.isdigit()) or int(key) >= len(items):
        raise ValueError(f"{dotted(path)} has the items 0 to {len(items) - 1}")
    return int(key)


def _opened(current: Any, path: FieldPath, key: str | int) -> Any:
    """The value at ``path``, made ready to hold ``key``."""
    if isinstance(key, int):
        return current if isinstance(current, list) else [current]
    if current is None:
        return {}
    named = next(part for part in reversed(path) if isinstance(part, str))
    return {SHORT[named]: current} if isinstance(current, str) and named in SHORT else current


def credentials(document: Document) -> list[Problem]:
    """A problem for every URI that opens what it names: by a password, a token or a signature. It is not repeated."""
    return [
        Problem(document.place(path).where, dotted(path), "a URI with a password; give credentials by the environment")
        for path, value in document_leaves(document.data)
        if isinstance(value, str) and _CREDENTIALS.search(value)
    ]


def document_leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Path and value of everything that holds nothing further, empty blocks and lists included."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from document_leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from document_leaves(item, (*path, index))
    else:
        yield path, value
