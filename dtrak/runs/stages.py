"""The stages of a piece of work: a progress bar, a time and a peak of memory for each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from .console import Nowhere, progress_bar
from .files import write_atomically
from .measure import StageClock
from .ranks import ranks

_FILE = "stages.json"


class Stages:
    """What was done, what it took, and what needed no doing.

    Attributes:
        console: where progress goes.
        clock: seconds and memory of the stages.
        reused: stages that needed no work, with the seconds they once took; None where not known.
        folder: where it is kept how long each took, over all commands; None for nowhere.

    Args:
        device: whose memory is watched.
        console: as above; None keeps quiet.
    """

    def __init__(self, device: torch.device, console: Console | None = None) -> None:
        self.console = Console(file=Nowhere()) if console is None else console
        self.clock = StageClock(device)
        self.reused: dict[str, float | None] = {}
        self.folder: Path | None = None

    @contextmanager
    def stage(self, name: str, of: str = "") -> Iterator[Callable[[int, int], None]]:
        """A timed stage with a progress bar; yields ``progress(done, total)``.

        Args:
            name: of the stage.
            of: tells several of one name in a folder apart.
        """
        start = time.perf_counter()
        try:
            with self.clock.stage(name), progress_bar(self.console, name) as progress:
                yield progress
        finally:
            self._keep(_key(name, of), time.perf_counter() - start)

    def reuse(self, name: str, of: str = "") -> None:
        """Note that a stage needs no work."""
        self.reused[name] = read_seconds(self.folder).get(_key(name, of))

    def say(self, line: str) -> None:
        """One line for whoever waits."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def lead(self) -> None:
        """Go on alone: of processes that share the work one scores and writes.

        Raises:
            LeftToOthers: another one does.
        """

    def _keep(self, name: str, seconds: float) -> None:
        """Add to what a stage took: one that is interrupted goes on another time."""
        if self.folder is None or not self.folder.is_dir():
            return
        here = ranks()
        if not here.speaks:
            return
        with here.alone(self.folder, "stages"):
            kept = read_seconds(self.folder)
            kept[name] = round(kept.get(name, 0.0) + seconds, 3)
            write_atomically(self.folder / _FILE, json.dumps(kept, indent=1).encode())


def _key(name: str, of: str) -> str:
    return f"{name}: {' '.join(of.split())}" if of else name


def read_seconds(folder: Path | None) -> dict[str, float]:
    """What the stages kept in a folder took, in seconds; nothing where that is not known."""
    if folder is None:
        return {}
    try:
        found: dict[str, float] = json.loads((folder / _FILE).read_text())
    # nice to know, and no more
    except (OSError, ValueError):
        return {}
    return found
