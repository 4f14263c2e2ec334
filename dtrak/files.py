"""Writing files that no crash or reader meets half of, and locks between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    temporary = file.with_name(file.name + ".partial")
    try:
        with temporary.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claim(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to be the one process that works on something; yields whether it is.

    The operating system lets go of the lock when the process ends, however it ends.

    Args:
        file: of the lock; made if missing, and left there.
        wait: until no other process is at it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
