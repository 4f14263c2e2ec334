"""What every command shares: progress bars, warnings and errors in one line, Ctrl-C, the device."""

from __future__ import annotations

import codecs
import difflib
import errno
import io
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError

from .interrupts import keep_quiet
from .ranks import ranks

if TYPE_CHECKING:
    import torch

    from ..data.samples import Samples

_IN_WORDS = "dtrak-in-words"
_WORDS = {
    "λ": "lambda", "φ": "phi", "σ": "sigma", "ε": "eps", "η": "eta", "β": "beta", "α": "alpha",
    "Φ": "Phi", "Ψ": "Psi", "ᵀ": "^T", "−": "-", "…": "...", "“": '"', "”": '"', "×": "x", "·": "*",
}  # fmt: skip
_PACKAGE = Path(__file__).parents[1]
# seconds between two lines about one stage, where they go to a file
_LOGGED_EVERY, _MODELS_LOGGED_EVERY = 10.0, 60.0
_NO_SPACE = (
    "no space left on the device: free some and run the same command again; "
    "what was finished is kept"
)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """What stands for letters that a stream cannot write."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = (_WORDS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters)
    return "".join(plain), error.end


codecs.register_error(_IN_WORDS, _in_words)


class Nowhere(io.StringIO):
    """Takes what is said where nobody is to hear it."""

    def write(self, text: str) -> int:
        """Drop it."""
        return len(text)


@contextmanager
def progress_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left; yields ``progress(done, total)`` and ends full.

    Of processes launched together one shows it: the first, or who works while the others wait.
    """
    was_quiet = console.quiet
    if not ranks().is_main and ranks().speaks:
        console.quiet = False
    try:
        with _progress_bar(console, name) as progress:
            yield progress
    finally:
        console.quiet = was_quiet


@contextmanager
def _progress_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        # a file or a pipe: a bar would show nothing until its end
        yield _logged_progress(console, name.strip())
        return
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{name:<28}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
        bar.update(task, total=bar.tasks[0].total or 1, completed=bar.tasks[0].total or 1)


def _logged_progress(console: Console, name: str) -> Callable[[int, int], None]:
    """A line at most once in ten seconds, and one at the end."""
    begin = said = time.monotonic()
    is_over = False

    def progress(done: int, total: int) -> None:
        nonlocal said, is_over
        now = time.monotonic()
        if is_over or (done < total and (now - said < _LOGGED_EVERY or not done)):
            return
        said, is_over = now, done >= total
        left = (now - begin) * (total - done) / max(done, 1)
        more = "" if is_over else f", about {format_seconds(left)} left"
        text = f"{name}: {done:,} of {total:,} in {format_seconds(now - begin)}{more}"
        console.print(text, highlight=False, soft_wrap=True)

    return progress


def format_seconds(seconds: float) -> str:
    """A time for a reader: ``12 s``, ``3 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def model_bar(
    console: Console, label: str, total: int
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over models; yields ``report(name, done, units)``, which also logs finished models."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.0f} models"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    parts: dict[str, float] = {}
    started: dict[str, float] = {}
    begin = said = time.monotonic()
    # a model takes minutes: its pace says more than that of the last half minute
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task(label, total=total)

        def report(name: str, done: int, units: int) -> None:
            nonlocal said
            started.setdefault(name, time.monotonic())
            # another process has finished one of 0 units
            parts[name] = done / units if units else 1.0
            so_far, now = sum(parts.values()), time.monotonic()
            progress.update(task, completed=so_far)
            if not console.is_terminal and now - said > _MODELS_LOGGED_EVERY and done < units:
                # a file or a pipe shows no bar
                left = format_seconds((now - begin) * (total - so_far) / max(so_far, 1e-9))
                text = f"{label}: {so_far:.1f} of {total} models, about {left} left"
                console.print(text, highlight=False)
                said = now
            if done == units > 0:
                seconds = time.monotonic() - started[name]
                console.print(f"{label} {name}: {seconds:.0f} s", highlight=False)

        yield report


@contextmanager
def reporting_errors(console: Console, traceback: bool = False) -> Iterator[None]:
    """Run a command's work: own warnings and errors become one line, Ctrl-C ends with 130.

    Args:
        console: where they go.
        traceback: let errors through, to show where they came from.

    Raises:
        typer.Exit: 2 for an error, 130 for an interruption.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _warnings_on(console):
            yield
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again, it resumes where it stopped")
        raise typer.Exit(130) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if traceback:
            raise
        message = " ".join(str(error).split())
        # Diffusers' writer wraps the operating system's error
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in message
        fail(console, _NO_SPACE if full else message)


@contextmanager
def _warnings_on(console: Console) -> Iterator[None]:
    """Print this package's own warnings as one line each, and once."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        shown: set[str] = set()

        def one_line(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
            if _PACKAGE in Path(filename).parents:
                # the same from two places says no more than once
                if str(message) not in shown:
                    shown.add(str(message))
                    text = f"warning: {message}"
                    console.print(
                        text, style="yellow", highlight=False, markup=False, soft_wrap=True
                    )
            else:
                show(message, category, filename, *rest)

        # a second guess is said again, whatever Python was told of warnings
        warnings.filterwarnings("always", module=r"dtrak(\.|$)")
        warnings.showwarning = one_line  # type: ignore[assignment]
        yield


def fail(console: Console, message: str) -> NoReturn:
    """Print one line and end the command with 2; of processes launched together one speaks."""
    here = ranks()
    if not here.is_first_to_fail():
        raise typer.Exit(2)
    if not here.is_main:
        console.quiet, message = False, f"rank {here.rank}: {message}"
    console.print(f"error: {message}", style="red", soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(2)


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a command as ``python -m name``; Ctrl-C ends it with 130 whenever it comes."""
    keep_quiet()
    for stream in (sys.stdout, sys.stderr):
        # a terminal in ASCII or Latin-1 shows what it has no letter for in words
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_IN_WORDS)
    try:
        app(
            args=list(arguments) if arguments is not None else sys.argv[1:],
            prog_name=f"python -m {name}",
        )
    except SystemExit as end:
        if end.code != 130:
            raise
        # Python itself would end by the signal if it came while some library was imported
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def tell(console: Console, what: str, samples: Samples) -> None:
    """Say in one line what was taken; where something was left out, loading it has said so."""
    if not samples.left_out:
        text = f"{what}: {samples.taken}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def check_device(name: str) -> None:
    """Refuse what is no name of a device, before torch is asked what there is.

    Raises:
        ValueError: it is none, or one of a kind that is not served.
    """
    if name != "auto" and not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        reason = ": features on Apple's GPU were never checked" if name.startswith("mps") else ""
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}{reason}")


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is the first GPU, or the CPU.

    Of processes that share their work each takes a GPU of its machine for ``auto`` or ``cuda``.

    Raises:
        ValueError: the name is unknown, or of a device that is not there.
    """
    check_device(name)
    # the rest of this module is what every command needs before it needs torch
    import torch

    here = ranks()
    if here.is_shared and name in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", here.local % torch.cuda.device_count())
        # kernels are launched on the current one
        torch.cuda.set_device(device)
        return device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must name a device that is there, got {name!r} with "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def check_source(option: str, value: str, names: list[str]) -> None:
    """Refuse a misspelt name before a hub is asked for it.

    Raises:
        ValueError: it is close to one of ``names`` and no path.
    """
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.7)
    if close and close[0] != value and not Path(value).exists():
        raise ValueError(f"{option} {value!r} does not exist; did you mean {close[0]!r}?")
