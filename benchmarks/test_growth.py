"""How time and memory grow with N, P, S, K and B; the exponents are printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from growth import AXES, CURVES, figures, sweep
from protocol import Absent, Outcome
from races import Clock

pytestmark = pytest.mark.usefixtures("whole_float32")

CASES = [(axis, name) for axis in AXES for name in CURVES[axis]]


@pytest.fixture(scope="module")
def sweeps(
    device: torch.device, smoke: bool
) -> Callable[[str], tuple[dict[str, list[Outcome]], list[int], dict[str, int]]]:
    """``sweeps(axis)``: measured once."""
    kept: dict[str, Any] = {}

    def get(axis: str) -> tuple[dict[str, list[Outcome]], list[int], dict[str, int]]:
        if axis not in kept:
            try:
                kept[axis] = sweep(axis, device, smoke=smoke)
            except Absent as reason:
                pytest.skip(str(reason))
        return kept[axis]

    return get


@pytest.mark.parametrize("axis, name", CASES)
def test_growth(
    benchmark: Any, axis: str, name: str, sweeps: Callable[[str], Any], record: Callable[..., None]
) -> None:
    curves, xs, fixed = sweeps(axis)
    row = {
        "group": f"against {axis}",
        "provider": name,
        "axis": axis,
        "sizes": fixed,
        **figures(curves[name], xs),
    }
    benchmark.group = f"growth: against {axis}, at the largest"
    benchmark.extra_info.update(row)
    # the benchmark shows the largest point; its curve is in the row
    Clock().replay(benchmark, curves[name][-1].seconds)
    record("growth", **row)
