"""Errors whose message is written for the person who made the mistake; the CLI prints them without a traceback."""

from __future__ import annotations

import errno
from typing import Any

BLOCKED = {
    errno.EACCES: "let this user read and write there, or name another place",
    errno.EPERM: "let this user read and write there, or name another place",
    errno.EROFS: "mount that file system for writing, or name another place",
    errno.ENOTDIR: "a file is where a folder is expected; remove it, or name another place",
    errno.EEXIST: "a file is where a folder is expected; remove it, or name another place",
    errno.EISDIR: "a folder is where a file is expected; remove it, or name another place",
    errno.ENOSPC: "free some space there, or name another place",
    errno.EDQUOT: "free some space there, or name another place",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What a person can do about an error of the file system, by its number."""


class UserError(ValueError):
    """Something the user wrote cannot be used. The message names file, line and field, and says what to do.

    It crosses processes with its message, whatever the constructor of a subclass takes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return restore_user_error, (type(self), self.args, vars(self))


class MissingExtra(UserError):
    """An optional dependency is not installed; the message is the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'rayalign[{extra}]'")


class Failed(Exception):
    """What a command needs has failed, through no mistake of the user's; the message says what, and what to do."""


class Stopped(Exception):
    """A run was asked to end before its last step; the message says where it is.

    It is not an error: the run can resume from there.
    """

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def restore_user_error(kind: type[UserError], arguments: tuple[Any, ...], state: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(state)
    return error


def blocked_path_error(error: BaseException) -> UserError | None:
    """What to say where the file system refuses a path of the user's; None for every other error."""
    if not isinstance(error, OSError) or error.errno not in BLOCKED or error.filename is None:
        return None
    return UserError(f"{error.filename2 or error.filename}: {error.strerror}: {BLOCKED[error.errno]}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
