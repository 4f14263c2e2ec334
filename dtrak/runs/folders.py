"""Output folders: each belongs to one run, and says what decided it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import LOCK_FILE, check_utf8, claim, expand_path, write_atomically

# of a folder, in it: what claims pieces of the work there
LOCKS = "locks"


class OutputError(ValueError):
    """An output folder that belongs to something else; the message says what differs."""


@contextmanager
def alone_in(folder: Path, part: range | None = None) -> Iterator[None]:
    """Keep other commands from writing into an output folder; readers are not kept away.

    Args:
        folder: made if missing.
        part: as in `files.claim`.

    Raises:
        OutputError: another command writes there.
    """
    with claim(folder / LOCK_FILE, part=part) as is_ours:
        if not is_ours:
            raise OutputError(
                f"another command is at work in {folder}: wait until it has ended, or choose "
                "another --output"
            )
        yield


def refuse_inside(folder: Path, **sources: str | None) -> None:
    """Refuse an output folder whose pictures would be read as images of a source.

    Args:
        folder: of the output.
        sources: folders of images by the names of their options, or whatever else they are.

    Raises:
        OutputError: it lies in one, or is one.
    """
    for name, source in sources.items():
        given = None if source is None else expand_path(source)
        if given is None or not given.is_dir():
            continue
        if folder.resolve().is_relative_to(given.resolve()):
            raise OutputError(
                f"--output must not lie in the folder of --{name}, whose images it would join: "
                f"got {folder} in {given}"
            )


@contextmanager
def alone_at(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """As `files.claim`, for one piece of the work in a folder, by its name."""
    with claim(folder / LOCKS / f"{name}.lock", wait=wait) as is_ours:
        yield is_ours


@dataclass(frozen=True)
class Record:
    """The JSON file in a folder that says what decided its content: whose the folder is.

    What decides is under the key ``settings``; what is beside it decides nothing.

    Attributes:
        file_name: of the file.
        other: what a folder holds that is another's.
        error: how it is refused.
        format: of the file, raised when it is written otherwise; None for one that says none.
        before: names of what may be in a folder that is nobody's yet.
    """

    file_name: str
    other: str = "another run"
    error: type[ValueError] = OutputError
    format: int | None = None
    before: frozenset[str] = frozenset()

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has one."""
        return (folder / self.file_name).is_file()

    def read(self, folder: Path) -> dict[str, Any] | None:
        """What the record of a folder holds; None where there is none.

        Raises:
            ValueError: `error`, where it is damaged or of another format.
        """
        file = folder / self.file_name
        if not self.is_in(folder):
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = found.get("format")
            # one of an older format may have no settings
            if known == self.format:
                dict(found["settings"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.damaged(folder) from error
        if known != self.format:
            raise self.error(
                f"{file} must be of format {self.format}, got {known or 'none'}: choose another "
                f"--output, or delete {folder}"
            )
        return found

    def damaged(self, folder: Path) -> ValueError:
        """That the record of a folder is."""
        return self.error(
            f"{folder / self.file_name} is damaged: choose another --output, or delete {folder}"
        )

    def check(
        self, folder: Path, settings: dict[str, Any], *, partly: bool = False
    ) -> dict[str, Any] | None:
        """Refuse a folder that `claim` would refuse; nothing is written.

        Args:
            folder: as there.
            settings: as there.
            partly: there are more, which are not known yet.

        Returns:
            What the file holds; None where it is missing.

        Raises:
            ValueError: as `claim`.
        """
        check_utf8(folder, "--output")
        if folder.exists() and not folder.is_dir():
            raise self.error(f"--output must be a folder, got the file {folder}")
        found = self.read(folder)
        if found is None:
            if not self.is_free(folder):
                raise self.error(
                    f"{folder} is not empty and holds no {self.file_name}: choose another --output"
                )
            return None
        there = found["settings"]
        if partly:
            there = {key: value for key, value in there.items() if key in settings}
        # as it will be read back: tuples are lists then
        differing = describe_differences(there, json.loads(json.dumps(settings)))
        if differing:
            raise self.error(
                f"{folder} holds {self.other}: {differing}. Choose another --output, or delete it"
            )
        return found

    def is_free(self, folder: Path) -> bool:
        """Whether a folder is missing, or nobody's: empty but for locks and killed writers'."""
        return not folder.exists() or all(
            path.suffix == ".partial" or path.name in (LOCK_FILE, LOCKS, *self.before)
            for path in folder.iterdir()
        )

    def claim(
        self,
        folder: Path,
        settings: dict[str, Any],
        held: ExitStack | None = None,
        part: range | None = None,
        also: dict[str, Any] | None = None,
        renew: bool = False,
    ) -> dict[str, Any]:
        """Make an output folder ours, or refuse it when it belongs to another run.

        Args:
            folder: made if missing.
            settings: what decides this one, JSON-serialisable.
            held: keeps other commands from writing there until it is closed; None keeps nobody
                away.
            part: of the work in the folder that is kept from others, as in `files.claim`; None for
                all.
            also: what is written beside the settings and decides nothing.
            renew: write that anew where the folder is ours already.

        Returns:
            What the file holds, after it was written if it was missing.

        Raises:
            ValueError: `error`: the folder is a file, holds something else, or a run with other
                settings (which are named). `OutputError`: another command is at work in it.
        """
        found = self.check(folder, settings)
        if held is not None:
            held.enter_context(alone_in(folder, part))
            # another command may have made it its own in between
            found = self.check(folder, settings)
        return self.write(folder, settings, also) if found is None or renew else found

    def write(
        self, folder: Path, settings: dict[str, Any], also: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the file, whatever is there; arguments and result as `claim`."""
        folder.mkdir(parents=True, exist_ok=True)
        format_ = {} if self.format is None else {"format": self.format}
        text = json.dumps({**format_, "settings": settings, **(also or {})}, indent=1)
        write_atomically(folder / self.file_name, text.encode())
        content: dict[str, Any] = json.loads(text)
        return content


def describe_differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """``key is a there and b here`` for every differing key, nested keys dotted; or nothing."""
    differences = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            nested = describe_differences(a, b)
            differences += [f"{key}.{part}" for part in nested.split("; ")] if nested else []
        elif a != b:
            differences.append(f"{key} is {_short(a)} there and {_short(b)} here")
    return "; ".join(differences)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"
