"""Growth: exponents, and curves that are checked at every point."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
growth = importlib.import_module("growth")
protocol = importlib.import_module("protocol")

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_the_exponent_of_a_power_law(power):
    x = [100, 200, 400, 1600]
    assert growth.exponent(x, [7.5 * value**power for value in x]) == pytest.approx(power)


def test_figures_are_lists_along_the_curve():
    outcomes = [
        protocol.Outcome(seconds=[0.5 * n, 1.0 * n, 2.0 * n], peak_bytes=n * n) for n in (2, 4, 8)
    ]
    found = growth.figures(outcomes, [2, 4, 8])
    assert found["p50_seconds"] == [2.0, 4.0, 8.0]
    assert found["peak_bytes"] == [4, 16, 64]
    outcomes[-1].peak_bytes = 16
    assert growth.figures(outcomes, [2, 4, 8])["memory_exponent_end"] == pytest.approx(0.0)
    assert found["time_exponent"] == pytest.approx(1.0)
    assert found["memory_exponent"] == pytest.approx(2.0)
    assert found["rounds"] == 3


# the fast lane sweeps another axis
@pytest.mark.full
def test_a_sweep_reports_parameters_themselves():
    curves, xs, fixed = growth.sweep("P", CPU, smoke=True)
    sizes = [
        sum(p.numel() for p in growth.make_unet(width, 8, 1).parameters()) for width in (8, 16)
    ]
    assert xs == sizes
    assert set(curves) == set(growth.CURVES["P"])
    assert all(len(outcomes) == 2 and outcomes[1].counts for outcomes in curves.values())
    assert "P" not in fixed
    assert fixed["B"] == growth.PLANS["smoke"].base.B


def test_a_wrong_curve_stops_the_sweep(monkeypatch):
    sketching = growth._sketching

    def doubled(workload, projection):
        run = sketching(workload, projection)()
        return lambda: lambda: 2 * run()

    monkeypatch.setattr(growth, "_sketching", doubled)
    with pytest.raises(AssertionError, match="at N = 2: disagrees with single backwards"):
        growth.sweep("N", CPU, smoke=True)


@pytest.mark.parametrize("device", ["cpu", "cuda", "smoke"])
def test_every_axis_has_points(device):
    plan = growth.PLANS[device]
    assert set(plan.values) == set(growth.AXES)
    for points in plan.values.values():
        assert list(points) == sorted(set(points))
        assert len(points) >= 2
