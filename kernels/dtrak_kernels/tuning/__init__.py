"""Measured launch configurations: one JSON file per operation in ``configs``, keyed by device name.

A file maps the device name to a list of ``{"sizes": {"B": 32, ...}, "config": {...}}``. Absent
files and unknown devices are normal: the caller has a default in code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"


def arch_of(device: torch.device) -> int | str:
    """What default configurations go by: CUDA compute capability times ten, or AMD's name."""
    if device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName
    return 10 * properties.major + properties.minor


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("config"), dict)):
        return False
    sizes = entry.get("sizes")
    return isinstance(sizes, dict) and all(
        isinstance(size, str) or (isinstance(size, int) and size > 0) for size in sizes.values()
    )


def is_power_of_two(value: Any, least: int, most: int) -> bool:
    """Whether a value of a file is such a number; ``true`` is none."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and least <= value <= most and value & (value - 1) == 0


def check_config(
    config: Mapping[str, Any],
    name: str,
    powers: Mapping[str, tuple[int, int]],
    counts: Mapping[str, tuple[int, int]],
    required: Collection[str],
) -> None:
    """Refuse a configuration that no launch can use.

    Args:
        config: from a file.
        name: what to call it in an error.
        powers: fields that are powers of two, with their least and largest value.
        counts: fields that are other whole numbers, likewise.
        required: fields that must be there.

    Raises:
        ValueError: a field is unknown, missing or not as above.
    """
    known = (*powers, *counts)
    for field in required:
        if field not in config:
            raise ValueError(f"{name}: {field} must be given, got {', '.join(config) or 'nothing'}")
    for field, value in config.items():
        if field not in known:
            raise ValueError(f"{name}: fields must be among {', '.join(known)}, got {field!r}")
        least, most = powers.get(field) or counts[field]
        if field in powers:
            is_good, what = is_power_of_two(value, least, most), "a power of two"
        else:
            is_int = isinstance(value, int) and not isinstance(value, bool)
            is_good, what = is_int and least <= value <= most, "a whole number"
        if not is_good:
            raise ValueError(
                f"{name}: {field} must be {what} from {least} to {most}, got {value!r}"
            )


def read_entries(path: Path, device_name: str) -> list[dict[str, Any]]:
    """What a file says of a device; nothing if there is no file.

    Raises:
        ValueError: the file is not as above.
    """
    if not path.exists():
        return []
    try:
        devices = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} must be JSON, got {error}") from None
    entries = devices.get(device_name, []) if isinstance(devices, dict) else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError(
            f'{path.name} must map {device_name} to a list of {{"sizes": ..., "config": ...}}, '
            "with sizes that are words or numbers above 0"
        )
    return entries


_entries = cache(read_entries)


def nearest(
    operation: str, device_name: str, sizes: Mapping[str, int | str], folder: Path | None = None
) -> dict[str, Any] | None:
    """The configuration measured at the sizes nearest to ``sizes``, by sum of squared log ratios.

    Args:
        operation: stem of the JSON file.
        device_name: as ``torch.cuda.get_device_name`` gives it.
        sizes: the problem, in the letters the file uses; where one is a word, only entries with
            the same word count.
        folder: where the files are, `CONFIGS` if ``None``.

    Returns:
        Keyword arguments of the operation's configuration, or ``None`` if nothing like it was
        measured on this device.

    Raises:
        ValueError: the file is not as above.
    """
    numbers = {key: size for key, size in sizes.items() if not isinstance(size, str)}
    words = {key: size for key, size in sizes.items() if isinstance(size, str)}

    def is_alike(entry: dict[str, Any]) -> bool:
        measured = entry["sizes"]
        return all(measured.get(key) == word for key, word in words.items()) and all(
            key in words or (key in numbers and not isinstance(measured[key], str))
            for key in measured
        )

    def distance(entry: dict[str, Any]) -> float:
        return sum(
            math.log(max(1, numbers[key]) / size) ** 2
            for key, size in entry["sizes"].items()
            if key in numbers
        )

    path = (CONFIGS if folder is None else folder) / f"{operation}.json"
    alike = [entry for entry in _entries(path, device_name) if is_alike(entry)]
    return min(alike, key=distance)["config"] if alike else None
