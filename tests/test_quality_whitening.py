"""The evidence of whitening: its page is that of its rows, and a case is what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dtrak.data.samples import Samples
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
    rows = sorted(quality.read_rows(quality.RESULTS), key=quality._order)
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


def test_whitened_batches_are_made_anew():
    """Gone through twice, they give the same images, timesteps and noise."""
    from tiny import tiny_model

    ids = [f"{i}" for i in range(40)]
    data = Samples(torch.rand(40, 1, 8, 8), ids, None, "made")
    for is_random, count in ((False, 10), (True, 30)):
        batches = quality.Batches(tiny_model(), data, "loss", 3, 20, is_random)
        first, again = ([(f().detach(), n) for f, n in batches] for _ in range(2))
        assert [n for _, n in first] == [count, count]
        for (a, _), (b, _) in zip(first, again, strict=True):
            assert torch.equal(a, b)
            assert len(a) == 30
