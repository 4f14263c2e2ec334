"""What every command shares: one line for errors, 130 for Ctrl-C, names checked."""

import io
import warnings
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console

from dtrak.runs import console as module
from dtrak.runs.console import (
    check_source,
    choose_device,
    fail,
    model_bar,
    progress_bar,
    reporting_errors,
)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def printed(console):
    return console.file.getvalue()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("x must be 1,\n  got 2"), 2, "error: x must be 1, got 2"),
        (FileNotFoundError("no folder at x"), 2, "error: no folder at x"),
        (RuntimeError("[bold]odd[/bold]"), 2, "error: [bold]odd[/bold]"),
        (OSError(28, "No space left on device"), 2, "error: no space left on the device: free"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again"),
    ],
)
def test_an_error_becomes_one_line(error, code, line, console):
    with pytest.raises(typer.Exit) as caught, reporting_errors(console):
        raise error
    assert caught.value.exit_code == code
    assert printed(console).startswith(line)
    assert printed(console).count("\n") == 1


def test_a_traceback_on_request_and_mistakes_of_our_own(console):
    with pytest.raises(ValueError, match="as it is"), reporting_errors(console, traceback=True):
        raise ValueError("as it is")
    with pytest.raises(TypeError), reporting_errors(console):
        raise TypeError
    with pytest.raises(typer.Exit):
        fail(console, "this")


def test_own_warnings_are_lines_and_others_stay_themselves(console):

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with reporting_errors(console):
            warnings.warn_explicit("mine", UserWarning, module.__file__, 1)
            warnings.warn_explicit("theirs", UserWarning, "/elsewhere/file.py", 1)
            # the same from two places is one line
            warnings.warn_explicit("mine", UserWarning, module.__file__, 2)
            warnings.warn_explicit("mine too", UserWarning, module.__file__, 2)
    assert printed(console) == "warning: mine\nwarning: mine too\n"
    assert [str(warning.message) for warning in seen] == ["theirs"]


def test_a_bar_ends_full():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console, "work") as progress:
        progress(1, 3)
    assert "3/3" in printed(console)
    with progress_bar(console, "no steps"):
        pass
    assert "1/1" in printed(console)


def test_progress_in_a_file_is_lines(console, monkeypatch):
    clock = iter([0, 3, 11, 12, 40, 41])
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(module, "time", fake)
    with progress_bar(console, "work") as progress:
        for done in (0, 1, 2, 4, 4):
            progress(done, 4)
    lines = ["work: 1 of 4 in 11 s, about 33 s left", "work: 4 of 4 in 40 s"]
    assert printed(console).splitlines() == lines
    clock = iter([0, 1, 1, 70, 70, 80, 80, 80])
    with model_bar(console, "train", 2) as report:
        report("a", 1, 4)
        report("a", 3, 4)
        report("a", 4, 4)
    assert "train: 0.8 of 2 models, about 2 min left\ntrain a: 79 s\n" in printed(console)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "mps", ""):
        with pytest.raises(ValueError, match=f"--device must be auto, .* got '{name}'"):
            choose_device(name)
    with pytest.raises(ValueError, match="must name a device that is there, got 'cuda:99'"):
        choose_device("cuda:99")


def test_misspelt_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--data .digit. does not exist; did you mean .digits.\?"):
        check_source("--data", "digit", ["digits"])
    check_source("--data", "digits", ["digits"])
    check_source("--data", "faces", ["digits"])
    (tmp_path / "digit").mkdir()
    check_source("--data", "digit", ["digits"])
