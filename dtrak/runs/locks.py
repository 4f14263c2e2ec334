"""Locks between processes, of the operating system: they end with the process, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

try:
    import fcntl
except ImportError:
    # Windows, which locks bytes: a file as a whole is one beyond those that parts are
    import msvcrt

    _WHOLE = range(2**40, 2**40 + 1)
    _POLL_SECONDS = 0.05

    def _lock(file: IO[Any], part: range, wait: bool) -> bool:
        while True:
            try:
                _change(file, part, msvcrt.LK_NBLCK)  # type: ignore[attr-defined]
            except PermissionError:
                if not wait:
                    return False
                time.sleep(_POLL_SECONDS)
            else:
                return True

    def _change(file: IO[Any], part: range, mode: int) -> None:
        os.lseek(file.fileno(), part.start, os.SEEK_SET)
        msvcrt.locking(file.fileno(), mode, len(part))  # type: ignore[attr-defined]

    @contextmanager
    def locked(file: IO[Any], part: range | None, wait: bool) -> Iterator[bool]:
        """As below; here claims of one process exclude each other too."""
        part = part or _WHOLE
        is_ours = _lock(file, part, wait)
        try:
            yield is_ours
        finally:
            if is_ours:
                _change(file, part, msvcrt.LK_UNLCK)  # type: ignore[attr-defined]

    def hold_shared(file: IO[Any], *, first: bool) -> bool:
        """As below."""
        raise OSError("Windows has no locks that processes share: run one command alone")
else:

    @contextmanager
    def locked(file: IO[Any], part: range | None, wait: bool) -> Iterator[bool]:
        """Try to lock an open file against other processes; yields whether it is.

        Args:
            file: open for writing; closing it ends the lock.
            part: consecutive numbers of at least 0, each a lock of its own; None for the file as a
                whole. A file is locked by parts or as a whole, never both.
            wait: until no other process has it.
        """
        how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            if part is None:
                fcntl.flock(file, how)
            else:
                fcntl.lockf(file, how, len(part), part.start)
        except BlockingIOError:
            yield False
            return
        yield True

    def hold_shared(file: IO[Any], *, first: bool) -> bool:
        """Lock a file as a whole together with others that do; closing it ends that.

        Args:
            file: open for reading and writing, not locked by parts.
            first: only where nobody has it yet, and then keep everybody away for the moment.

        Returns:
            Whether it is locked so.
        """
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
