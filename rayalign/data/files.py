"""Files of rows, opened for reading: local or remote, decompressed, and seen to be what their names say."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, Any, Final, cast

import fsspec
import pyarrow

from rayalign.config.suffixes import READ, Suffix, data_suffix
from rayalign.errors import UserError, first_line

HEAD_BYTES = 512
_DECOMPRESS: Final[Mapping[str, Callable[[IO[bytes]], Any]]] = MappingProxyType(
    {
        ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": lambda stream: pyarrow.CompressedInputStream(pyarrow.PythonFile(stream), "zstd"),
    }
)


def suffix_of(path: str) -> Suffix:
    """Raises UserError for a file that is not read, by its name."""
    suffix = data_suffix(path)
    if suffix is None:
        raise UserError(f"{path}: rows are read from {READ}, or a dataset; convert this file")
    return suffix


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a local path or a URL that fsspec knows (``s3://``, ``gs://``, ``hf://`` …) for reading bytes.

    What is behind ``http(s)://`` is copied to this machine's disk first, since servers need not send parts of files.

    Raises:
        UserError: there is no such file, or it cannot be reached.
    """
    with _telling(path):
        stream = fsspec.open(path, "rb", **file_system_options(path)).open()
    with _copied(stream, path) if is_web(path) else stream as opened:
        yield cast(IO[bytes], opened)


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def file_system_options(path: str) -> dict[str, Any]:
    """For the file system of a path."""
    if not is_web(path):
        return {}
    from aiohttp import ClientTimeout  # which fsspec needs for such addresses

    return {"block_size": 0, "client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=300)}}


@contextmanager
def _copied(stream: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as copy:
        with stream, _telling(path):
            shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield cast(IO[bytes], copy)


@contextmanager
def _telling(path: str) -> Iterator[None]:
    """What goes wrong on the way to a file, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        cause = error.__cause__ if is_web(path) else None  # fsspec says so of everything that a server answers
        if cause is not None:
            raise UserError(f"{path}: cannot be read: {first_line(cause)}") from error
        raise UserError(f"{path}: {error.strerror or 'no such file'}") from error
    except (ImportError, ValueError) as error:  # no driver for this kind of URL; the message names the package
        raise UserError(f"{path}: {first_line(error)}") from error
    except Exception as error:
        if "://" not in path:
            raise
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def open_raw(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file of rows, as they are stored, in a stream that can seek.

    Raises UserError for a file that only stands for another: a pointer of Git LFS, or a page that a server sent.
    """
    with open_binary(path) as stream:
        head = stream.read(HEAD_BYTES)
        refuse_stand_ins(path, head)
        stream.seek(0)
        yield stream


@contextmanager
def open_rows(path: str) -> Iterator[Any]:
    """The bytes of a file of rows, decompressed."""
    with open_raw(path) as stream:
        compression = suffix_of(path).compression
        if not compression:
            yield stream
            return
        with _DECOMPRESS[compression](stream) as plain:
            yield plain


def refuse_stand_ins(path: str, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: is a web page, not rows; name the address of the file itself, on the Hub …/resolve/…")
