"""`--smoke` runs every case once on tiny sizes; `--record` appends rows to results/*.jsonl."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser):
    group = parser.getgroup("dtrak benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny sizes: does the code still run?")
    group.addoption("--record", action="store_true", help="append rows to the results")
    group.addoption("--rows", default=str(HERE / "results"), help="folder of the rows")


@pytest.fixture(scope="session")
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit() -> str:
    """The commit measured; rows appended in the same session do not make it dirty."""
    try:
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    import triton

    return {
        "device": processor(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@pytest.fixture
def record(request, smoke):
    """``record(case, **figures)`` appends a row, if asked to and not in a smoke run."""

    def record(case: str, **figures) -> None:
        if smoke or not request.config.getoption("--record"):
            return
        folder = Path(request.config.getoption("--rows"))
        folder.mkdir(parents=True, exist_ok=True)
        row = {"case": case, **figures, **environment()}
        with (folder / f"{case}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    return record
