"""Writing files so that a crash, or a reader, never meets half of one."""

from __future__ import annotations

import os
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
