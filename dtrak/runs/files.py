"""Writing files that no crash or reader meets half of, and locks between processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .locks import locked

# of an output folder, in it: whoever holds it writes there, and no reader minds it
LOCK_FILE = ".lock"


def picture_name(seed: int) -> str:
    """Name of the file of the picture drawn from a seed, which is the picture's id too."""
    return f"{seed:05d}.png"


def picture_seed(name: str) -> int:
    """The seed in the name of a picture that was drawn."""
    return int(Path(name).stem)


def expand_path(path: str | os.PathLike[str]) -> Path:
    """A path as it is meant: ``~`` and ``~user`` are home folders, wherever a path is taken.

    Shells leave ``--output=~/runs`` as it is, and notebooks know no shell. Variables such as
    ``$HOME`` are part of a name.

    Raises:
        ValueError: there is no such user, and nothing of that name.
    """
    text = os.fspath(path)
    expanded = Path(os.path.expanduser(text))
    if text.startswith("~") and str(expanded).startswith("~") and not expanded.exists():
        raise ValueError(
            f"a path that begins with ~ must be of a user's home folder, got {text!r}: "
            f"'./{text}' is one here"
        )
    return expanded


def check_utf8(path: Path, what: str) -> Path:
    """A path, refused where safetensors cannot open it.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the path of {what} must be UTF-8, as safetensors opens no other, got "
            f"{os.fsencode(path)!r}: rename it"
        ) from None
    return path


def plain_stem(path: str | Path) -> str:
    """The stem of a path as part of a name of ours: in UTF-8, whatever it is."""
    return Path(path).stem.encode("utf-8", "replace").decode().replace("?", "_")


def encode_text(text: str) -> bytes:
    """UTF-8 of a text for readers; bytes of a file name that are no text are shown in hex."""
    return text.encode("utf-8", "backslashreplace")


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


def encode_tensors(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content: the library shuffles metadata."""
    from safetensors.torch import save

    content = save(tensors, metadata=metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    # values begin at a multiple of 8, as the format asks
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@contextmanager
def claim(file: Path, *, wait: bool = False, part: range | None = None) -> Iterator[bool]:
    """Try to be the one process that works on something; yields whether it is.

    The operating system lets go of the lock when the process ends, however it ends.

    Args:
        file: of the lock; made if missing, and left there.
        wait: until no other process is at it.
        part: consecutive numbers of at least 0, of which this process works on these alone; another
            process may have others. Claims of one process do not exclude each other then, and all
            end with the first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened, locked(opened, part, wait) as is_ours:
        yield is_ours
