"""What the fast lane leaves out, and that its last line says so."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import one_of_each

CASES = """
import pytest

@pytest.mark.full
@pytest.mark.parametrize("n", range(3))
def test_slow(n):
    assert n < 3

@pytest.mark.gpu
def test_card():
    pass

@pytest.mark.sweep
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(5))
def test_sweep(a, b):
    pass

def test_quick():
    pass
"""


class Case(SimpleNamespace):
    """An item, as far as a sweep looks at it."""

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "sizes, strength, number", [((3, 4), 1, 4), ((2, 3, 6), 1, 6), ((2, 3, 4), 2, 12), ((5,), 1, 5)]
)
def test_one_of_each_value_is_taken(sizes, strength, number):
    items = [
        Case(callspec=SimpleNamespace(params=dict(zip("abc", place, strict=False))))
        for place in itertools.product(*map(range, sizes))
    ]
    taken = [tuple(item.callspec.params.values()) for item in one_of_each(items, strength)]
    assert len(taken) == len(set(taken))
    # not always the fewest there could be
    assert number <= len(taken) <= number + 2
    for axes in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        wanted = set(itertools.product(*(range(sizes[axis]) for axis in axes)))
        assert {tuple(values[axis] for axis in axes) for values in taken} == wanted


def last_line(folder, *arguments):
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_cases.py").write_text(CASES)
    markers = "\n".join(f"    {name}: of ours" for name in ("full", "gpu", "sweep"))
    (folder / "pytest.ini").write_text(
        f"[pytest]\naddopts = --strict-markers\nmarkers =\n{markers}"
    )
    # no card is seen, whatever is there, and this is no worker of the session it runs in
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary, last = done.stdout.splitlines()[-2:]
    return summary.split(" in ")[0], last


GPU = "1 that need a GPU"


@pytest.mark.parametrize(
    "arguments, summary, last",
    [
        # three are slow, and five of twenty show each of four and five values
        ((), "6 passed, 1 skipped, 18 deselected", f"18 of the full lane (make test-full), {GPU}"),
        pytest.param(
            ("-n", "2"),
            "6 passed, 1 skipped",
            f"18 of the full lane (make test-full), {GPU}",
            marks=pytest.mark.full,
        ),
        pytest.param(("--full",), "24 passed, 1 skipped", GPU, marks=pytest.mark.full),
        pytest.param(("-m", "full"), "18 passed, 7 deselected", "nothing", marks=pytest.mark.full),
        pytest.param(("test_cases.py::test_slow",), "3 passed", "nothing", marks=pytest.mark.full),
    ],
)
def test_the_last_line_says_what_was_left_out(arguments, summary, last, tmp_path):
    assert last_line(tmp_path, *arguments) == (summary, f"left out: {last}")
