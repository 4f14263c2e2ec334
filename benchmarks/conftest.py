"""`--smoke` runs every case once on tiny sizes; `--record` appends rows to results/*.jsonl.

A case is a race between providers, run when the first of them is due; every provider is a
benchmark of its own, whose durations are those of its rounds in the race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from protocol import Roofs, measure_roofs
from races import Races
from rows import RESULTS, append, environment, summary

__all__ = ["environment"]

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dtrak benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does the code still run?")
    group.addoption("--large", action="store_true", help="on a CPU, too, the real CIFAR U-Net")
    group.addoption("--record", action="store_true", help="append rows to the results")
    group.addoption("--rows", default=str(RESULTS), help="folder of the rows")
    group.addoption(
        "--seconds", type=float, default=0.6, help="time per provider beyond three rounds"
    )


class Benchmark:
    """Stands in for pytest-benchmark where it is not installed: rows need none of it."""

    group: str | None = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            function()


if find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> Benchmark:
        return Benchmark()


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def whole_float32() -> Iterator[None]:
    """Convolutions in float32 keep all 24 bits on a GPU, too, which by default they do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def best_roofs() -> dict[str, Roofs]:
    """The best rates seen in this session, by dtype."""
    return {}


@pytest.fixture(scope="module")
def roofs(
    device: torch.device, smoke: bool, best_roofs: dict[str, Roofs]
) -> Callable[[str], Roofs]:
    """``roofs(dtype)``: what this machine does at best, measured once more in every suite."""
    measured: set[str] = set()

    def best(dtype: str) -> Roofs:
        if dtype not in measured:
            measured.add(dtype)
            found = measure_roofs(device, dtype, smoke=smoke)
            best_roofs[dtype] = found.best(best_roofs.get(dtype, found))
        return best_roofs[dtype]

    return best


@pytest.fixture(scope="session")
def session_row() -> dict[str, Any]:
    """What all rows of a session share; ``run`` tells sessions apart."""
    shared = environment()
    return shared | {"run": shared.pop("utc")}


@pytest.fixture(scope="session")
def record(
    request: pytest.FixtureRequest, smoke: bool, session_row: dict[str, Any]
) -> Callable[..., None]:
    """``record(suite, **figures)`` appends a row, if asked to and not in a smoke run."""
    folder = Path(request.config.getoption("--rows"))
    rows = request.config.stash.setdefault(ROWS, [])

    def record(suite: str, **found: Any) -> None:
        row = {"suite": suite, **found, **session_row}
        rows.append(row)
        if not smoke and request.config.getoption("--record"):
            append(folder, suite, row)

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per provider: what the rows say, recorded or not."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("rows")
    group = None
    for row in rows:
        if (row["suite"], row["group"]) != group:
            group = row["suite"], row["group"]
            sizes = ", ".join(f"{name} = {size:,}" for name, size in row["sizes"].items())
            terminalreporter.write_line(f"{group[0]}: {group[1]} ({sizes})")
        terminalreporter.write_line(f"  {row['provider']:44} {summary(row)}")


@pytest.fixture(scope="session")
def races(
    request: pytest.FixtureRequest,
    device: torch.device,
    smoke: bool,
    record: Callable[..., None],
) -> Races:
    return Races(device, request.config.getoption("--seconds"), smoke, record)
