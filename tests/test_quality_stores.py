"""The evidence of stores: their page is that of their rows, and a row is what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dtrak.evaluation.lds.table import Results
from dtrak.evaluation.retraining import TRAIN
from dtrak_kernels.ridge import RidgeSolver

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quality = importlib.import_module("quality_stores")
growth = importlib.import_module("store_growth")


@pytest.mark.parametrize("page", [quality, growth])
def test_the_page_is_up_to_date(page):
    page.TABLE.bring_up_to_date(only_check=True)


def test_only_training_features_are_rounded(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = {TRAIN: 30, "validation": 4, "generated": 4}
    features = {name: torch.randn(n, 6, generator=generator) for name, n in sizes.items()}
    seen = {}
    monkeypatch.setattr(quality, "measure", lambda *given: seen.update(given[2]) or [])
    subsets = torch.rand(12, 30, generator=generator) < 0.5
    row = quality.case_of(features, "bfloat16", "loss", Results({}, subsets, {}, []))
    rounded = features[TRAIN].bfloat16().float()
    assert torch.equal(seen[TRAIN], rounded)
    assert seen["generated"] is features["generated"]
    assert (row["dtype"], row["bytes"], row["cases"]) == ("bfloat16", 12, [])
    assert 1e-4 < row["error"] < 2**-8
    unit = float(rounded.double().square().sum(1).mean())
    assert row["auto"] == pytest.approx(RidgeSolver(rounded).auto_damping() / unit)
