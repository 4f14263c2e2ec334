"""Rows of results: one JSON object a line, appended, never changed."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dtrak.runs.measure import format_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def processor() -> str:
    """The GPU's name, or that of the CPU with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit() -> str:
    """The commit measured; rows appended in the same session do not make it dirty."""
    try:
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def utc() -> str:
    """The time now, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def driver() -> str:
    """Version of the GPU's driver, if it can be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def installed(package: str) -> str | None:
    """Version of a package, if it is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code that was timed."""
    cuda = torch.cuda.is_available()
    return {
        "device": processor(),
        "device_type": "cuda" if cuda else "cpu",
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "diffusers": installed("diffusers"),
        "python": platform.python_version(),
        "commit": commit(),
        "utc": utc(),
    }


def append(folder: Path, suite: str, row: dict[str, Any]) -> None:
    """Add a row to the suite's file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{suite}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path, suite: str) -> list[dict[str, Any]]:
    """All rows of a suite in the order they were appended; none if it has no file."""
    file = folder / f"{suite}.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def format_seconds(seconds: float) -> str:
    """Three digits: ``12.3 ms``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def summary(row: dict[str, Any]) -> str:
    """A row's figures on one line."""
    if "axis" in row:
        return (
            f"exponents over {row['x'][0]:,} to {row['x'][-1]:,} (over the last step): "
            f"time {row['time_exponent']:+.2f} ({row['time_exponent_end']:+.2f}), "
            f"memory {row['memory_exponent']:+.2f} ({row['memory_exponent_end']:+.2f})"
        )
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    return (
        f"{format_seconds(row['p50_seconds']):>8} {ratio:>9} {format_bytes(row['peak_bytes']):>8} "
        f"{100 * row['roof_fraction']:5.1f}% of roof"
    )
