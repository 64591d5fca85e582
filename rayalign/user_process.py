"""The program in which a user's function runs: it answers calls until its caller is gone.

:class:`rayalign.user_function.UserFunction` starts it by its path, so that it imports nothing of this package before it
knows where that is. Whatever the function does to its process, it does to this one alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from multiprocessing.connection import Connection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

LONGEST = 500
"""Characters of what is shown of an error or a value."""


def main(connection: int, trace: int) -> None:
    """Import the function that the first message names, then answer one message per call. Both are file descriptors.

    What hangs is ended by a timer that needs no part of Python, and leaves the place where it hung in ``trace``.
    """
    for descriptor in (connection, trace):
        os.set_inheritable(descriptor, False)
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = Connection(connection)
    threading.Thread(target=receive, args=(link, asked), daemon=True).start()
    first = asked.get()
    sys.path[:] = first["path"]
    function: Callable[..., Any] | None = None
    from rayalign.errors import UserError
    from rayalign.imports import load_function, refuse_lazy

    with time_limit(first["start_seconds"], trace):
        try:
            function = load_function(first["name"], *first["like"], **first["keywords"])
            refuse_lazy(first["name"], function)
            answer: dict[str, Any] = {"ready": threading.get_ident()}
        except UserError as error:
            function, answer = None, {"problem": str(error)}
        except BaseException as error:
            answer = {"raised": exception_line(error)}
    send(link, answer)
    while function is not None:
        arguments = asked.get()
        with time_limit(first["seconds"], trace):
            answer = call_outcome(function, arguments, first["keywords"])
        send(link, answer)


def receive(link: Connection, asked: queue.SimpleQueue[Any]) -> None:
    """Read messages beside the function, which may hang: where the asker is gone, so are this process and its own."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked.put(link.recv())
    os.killpg(os.getpgrp(), signal.SIGKILL)


def send(link: Connection, answer: dict[str, Any]) -> None:
    """As JSON: what a reply may have made of this process is no reason to unpickle anything of it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the function may have closed or replaced it
            stream.flush()
    link.send_bytes(json.dumps(answer).encode())


@contextlib.contextmanager
def time_limit(seconds: float, trace: int) -> Iterator[None]:
    faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def call_outcome(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """What a call came to."""
    try:
        value = function(*arguments, **keywords)
        try:
            return {"returned": to_json_value(value), "shown": safe_repr(value)}
        except NotPlain as kind:
            return {"refused": str(kind), "shown": safe_repr(value)}
    except BaseException as error:
        return {"raised": exception_line(error)}


class NotPlain(Exception):
    """A value that is no number, text, None, or list of those."""


def to_json_value(value: Any) -> Any:
    """``value`` as JSON has it: numbers, arrays and tensors of any library become Python's own.

    Raises:
        NotPlain: it is something else; the message is its type.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple) and len(value) <= LONGEST:
        return [to_json_value(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, type):
        return to_json_value(value.tolist())
    if isinstance(value, Integral) and abs(int(value)) < 2**63:
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value)
    if hasattr(value, "close") and hasattr(value, "cr_await"):
        value.close()  # a coroutine that is never awaited would warn later
    raise NotPlain(type(value).__name__)


def safe_repr(value: Any) -> str:
    try:
        return repr(value).encode("utf-8", errors="backslashreplace").decode()[:LONGEST]
    except Exception:  # of an integer with very many digits, say
        return f"a value of type {type(value).__name__}"


def exception_line(error: BaseException) -> str:
    """An exception in one line: its type, its words, and where the user's code raised it."""
    if isinstance(error, SystemExit):
        said = f"called sys.exit({'' if error.code is None else repr(error.code)})"
    else:
        words = " ".join(words_of(error).split())[:LONGEST]
        said = f"raised {type(error).__name__}{': ' if words else ''}{words}"
    here = Path(__file__).parent
    ours = (__file__, str(here / "imports.py"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    where = innermost_place([(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)])
    return f"{said} ({where})" if where else said


def words_of(error: BaseException) -> str:
    """What an exception says, in characters that can be written; nothing where it cannot say it."""
    try:
        return str(error).encode("utf-8", errors="backslashreplace").decode()
    except Exception:
        return ""


def innermost_place(frames: Sequence[tuple[str, int, str]]) -> str:
    """The innermost of (file, line, function) that is in no library, or of all; frames run outwards from there."""
    known = [frame for frame in frames if not frame[0].startswith("<frozen")]
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    for file, line, name in [*(frame for frame in known if not frame[0].startswith(libraries)), *known]:
        return f"at {Path(file).name}:{line} in {name}"
    return ""


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
