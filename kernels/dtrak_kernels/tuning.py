"""Measured launch configurations: one JSON file per operation in ``configs``, keyed by device name.

A file maps the device name to a list of ``{"sizes": {"B": 32, ...}, "config": {...}}``. Absent
files and unknown devices are normal: the caller has a default in code.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"


@cache
def _entries(path: Path, device_name: str) -> list[dict[str, Any]]:
    return json.loads(path.read_text()).get(device_name, []) if path.exists() else []


def nearest(
    operation: str, device_name: str, sizes: dict[str, int], folder: Path = CONFIGS
) -> dict[str, Any] | None:
    """The configuration measured at the sizes nearest to ``sizes``, by sum of squared log ratios.

    Args:
        operation: stem of the JSON file.
        device_name: as ``torch.cuda.get_device_name`` gives it.
        sizes: the problem, in the letters the file uses.
        folder: where the files are.

    Returns:
        Keyword arguments of the operation's configuration, or ``None`` if nothing was measured on
        this device.
    """

    def distance(entry: dict[str, Any]) -> float:
        return sum(math.log(max(1, sizes[k]) / v) ** 2 for k, v in entry["sizes"].items())

    entries = _entries(folder / f"{operation}.json", device_name)
    return min(entries, key=distance)["config"] if entries else None
