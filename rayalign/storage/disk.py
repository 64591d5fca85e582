"""A disk that is full: said with the path, what was wanted and what there is, and without leaving a torn directory."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayalign.errors import UserError
from rayalign.storage.place import ObjectPath, Place, remove

if TYPE_CHECKING:
    from torch import nn

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space left on the device, in the quota, or in the largest file that this process may write."""
OS_ERROR = re.compile(r"os error (\d+)")
"""How safetensors tells the number of an error of the system."""
TRAINED_COPIES = 3
"""Copies of a trained parameter in a checkpoint: its value and AdamW's two moments, in float32."""


class DiskFull(UserError):
    """What was to be written did not fit; what had been committed before is whole."""


@contextlib.contextmanager
def room_for(directory: Place, wanted: int) -> Iterator[None]:
    """While the block writes ``directory``, of about ``wanted`` bytes and not committed yet, a full disk is a message.

    Raises:
        DiskFull: the disk is full; what there was of ``directory`` is removed.
    """
    try:
        yield
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        remove(directory)
        there = (
            "this node has no room"
            if isinstance(directory, ObjectPath)
            else f"{free_bytes(directory):,} are free there"
        )
        raise DiskFull(
            f"{directory} could not be written ({reason}): it wants about {wanted:,} bytes, and {there}. What was "
            "committed before is whole. Free some space, or write a smaller checkpoint.keep; then the same "
            "command continues from the newest checkpoint"
        ) from error


def full_disk(error: BaseException) -> str | None:
    """What the system said, if ``error``, or one that it came of, is that of a disk without room; else None."""
    seen: BaseException | None = error
    while seen is not None:
        told = OS_ERROR.search(str(seen))
        if isinstance(seen, OSError) and seen.errno in FULL:
            return str(seen.strerror)
        if told is not None and int(told.group(1)) in FULL:
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that ``path`` is, or would be, on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def num_training_bytes(model: nn.Module) -> int:
    """About what a checkpoint of ``model`` takes, however its parameters are spread over workers."""
    num_bytes = 0
    for own in model.parameters():
        copies = TRAINED_COPIES if own.requires_grad else 1
        num_bytes += 4 * copies * getattr(own, "ds_numel", own.numel())
    return num_bytes


def save_object(value: Any, path: Path) -> None:
    """``torch.save`` through Python's file, whose errors have a number."""
    import torch

    with path.open("wb") as file:
        torch.save(value, file)
