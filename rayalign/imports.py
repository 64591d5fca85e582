"""What users name in a configuration as ``module:attribute``: their own scorer, label rule or method."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from rayalign.errors import UserError, first_line


def load_object(name: str) -> Any:
    """The object at ``my_pkg.rewards:helpful`` or ``path/to/rewards.py:helpful``.

    A module is looked for where Python looks; a file is one module by itself, without relative imports.

    Raises:
        UserError: ``name`` has no colon, or there is no such module, file or attribute.
    """
    place, separator, attribute = name.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not separator or not attribute or not (is_module or place.endswith(".py")):
        raise UserError(f"{name!r} names nothing to import: write module:name, such as my_pkg.rewards:helpful")
    module = _load_file(Path(place), name) if place.endswith(".py") else _load_module(place, name)
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        raise UserError(f"{name!r}: {place} has no {attribute!r}; check the spelling") from error


def load_function(name: str, /, *positional: object, **keywords: object) -> Callable[..., Any]:
    """The function at ``name``, once it is known that it can be called with such arguments.

    Raises:
        UserError: there is none, it is no function, or its parameters are others.
    """
    function: Callable[..., Any] = load_object(name)
    if not callable(function):
        raise UserError(f"{name!r} is a {type(function).__name__}, not a function")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return function
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        call = ", ".join([*map(repr, positional), *(f"{key}={value!r}" for key, value in keywords.items())])
        raise UserError(f"{name!r} takes {signature}, and is called with ({call}): {error}") from error
    return function


def refuse_lazy(name: str, function: Callable[..., Any]) -> None:
    """Raise UserError where calling ``function`` runs nothing: an async function, or a generator."""
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise UserError(f"{name!r} is an async function, and nothing would await it: write def, not async def")
    if inspect.isgeneratorfunction(called):
        raise UserError(f"{name!r} is a generator: return its value, do not yield it")


def _load_module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise UserError(_failed(name, place, error)) from error  # something that it imports does not exist
        raise _no_module(error.name, name) from error
    except (Exception, SystemExit) as error:  # a module of the user's may do anything when it is imported
        raise UserError(_failed(name, place, error)) from error


def _failed(name: str, place: str, error: BaseException) -> str:
    """How the import of a user's module went wrong, and in which of its lines."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}:{error.lineno})"
    said = error.msg if isinstance(error, SyntaxError) else first_line(error)
    return f"{name!r}: {place} cannot be imported: {type(error).__name__}: {said}{where}"


def _no_module(missing: str, name: str) -> UserError:
    return UserError(
        f"{name!r}: there is no module {missing!r}; install it, put it on PYTHONPATH, or name its file: "
        "path/to/file.py:name"
    )


def _existing(path: Path, name: str) -> Path:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"{name!r}: there is no file {path}")
    return path


def _load_file(path: Path, name: str) -> ModuleType:
    path = _existing(path, name)
    key = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[key] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[key]
            raise UserError(_failed(name, str(path), error)) from error
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def source_digest(name: str) -> str:
    """SHA-256 of the source file that ``name`` is loaded from; its module is not run.

    Raises UserError where there is none, as for a compiled module: what it computes could not be recognised again.
    """
    place = name.rpartition(":")[0]
    file = _existing(Path(place), name) if place.endswith(".py") else _module_file(place, name)
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{name!r}: {place} has no source file; name a function of a Python file")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _module_file(place: str, name: str) -> Path:
    """Where a module's code is; a path that is no file where it has none."""
    try:
        found = importlib.util.find_spec(place)
    except ModuleNotFoundError as error:
        raise _no_module(error.name or place, name) from error
    except (Exception, SystemExit) as error:  # the packages around a module are imported
        raise UserError(_failed(name, place, error)) from error
    if found is None:
        raise _no_module(place, name)
    return Path(found.origin or "")
