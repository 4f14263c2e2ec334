"""The evidence of whitening: its page is that of its rows, and a case is what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dtrak.evaluation.lds.statistics import halves, lds
from dtrak.evaluation.lds.table import Results
from dtrak.evaluation.retraining import TRAIN
from dtrak.methods.scores import trak
from dtrak_kernels.ridge import RidgeSolver

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quality = importlib.import_module("quality_whitening")
plots = importlib.import_module("plots")

N, R, M = 30, 12, 4


def test_the_page_is_up_to_date():
    quality.TABLE.bring_up_to_date(only_check=True)
    rows = sorted(quality.rows_of("digits"), key=quality._order)
    assert plots.is_current(quality.PAGE.with_suffix(".svg"), rows)


def test_a_case_is_judged_on_models_that_did_not_choose(monkeypatch):
    monkeypatch.setattr(quality, "RESAMPLES", 20)
    generator = torch.Generator().manual_seed(0)
    features = {
        name: torch.randn(size, 6, generator=generator) * torch.logspace(1, -1, 6)
        for name, size in ((TRAIN, N), ("validation", M), ("generated", M))
    }
    subsets = torch.rand(R, N, generator=generator) < 0.5
    losses = {kind: torch.randn(R, M, generator=generator) for kind in quality.QUERIES}
    cases = quality.measure("x", 10, features, Results({}, subsets, losses, []))
    solver = RidgeSolver(features[TRAIN])
    unit = float(features[TRAIN].double().square().sum(1).mean())
    for case in cases:
        kind = case["queries"]
        dampings = [float(m) * unit for m in quality.MULTIPLES] + [solver.auto_damping()]
        scores = [trak(solver, features[kind], damping) for damping in dampings]
        first, second = (
            [lds(s, subsets[half], losses[kind][half]) for s in scores] for half in halves(R)
        )
        chosen = [max(range(len(f)), key=f.__getitem__) for f in (first, second)]
        wanted = (second[chosen[0]] + first[chosen[1]]) / 2
        assert case["held_out"]["lds"] == pytest.approx(wanted, abs=2e-6)
        assert case["1"]["lds"] == pytest.approx(lds(scores[5], subsets, losses[kind]), abs=2e-6)
        assert case["auto"]["lds"] == pytest.approx(
            lds(scores[-1], subsets, losses[kind]), abs=2e-6
        )


def test_fewer_columns_give_the_same_scores():
    generator = torch.Generator().manual_seed(0)
    sizes = (N, 40 * N), (M, 40 * N)
    train, queries = (torch.randn(size, generator=generator).double() for size in sizes)
    few, short = quality.reduced(train, queries)
    assert (few.shape, short.shape) == ((N, N), (M, N))
    kernel = train @ train.T
    assert (few @ few.T - kernel).norm() < 1e-12 * kernel.norm()
    for damping in (1e-6, 1.0, 1e6):
        inverse = torch.linalg.inv(kernel + damping * torch.eye(N).double())
        expected = queries @ train.T @ inverse
        found = trak(RidgeSolver(few), short, damping)
        assert (found - expected).norm() < 1e-5 * expected.norm()
    # nothing is gained where there are few
    assert quality.reduced(few, short)[0] is few


def test_lines_are_the_rows():
    from matplotlib.figure import Figure

    rows = [r for r in quality.rows_of("digits") if (r["function"], r["proj_dim"]) == ("loss", 0)]
    ax = Figure().subplots()
    quality.draw_lines(ax, rows[::-1], "generated", lambda row: row["timesteps"])
    for kind, line in zip(quality.KINDS, ax.containers, strict=True):
        held = {
            row["timesteps"]: case["held_out"]
            for row in rows
            for case in row["cases"]
            if (row["kind"], case["queries"]) == (kind, "generated")
        }
        points, _, (bars,) = line
        assert line.get_label() == kind
        places, values = points.get_data()
        assert places == pytest.approx(sorted(held), rel=0.15)
        assert values == pytest.approx([100 * held[steps]["lds"] for steps in sorted(held)])
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        assert ends == [pytest.approx([100 * e for e in held[s]["bca"]]) for s in sorted(held)]
