"""λ: a number, a number of mean squared feature norms, or chosen."""

import pytest
import torch

from dtrak.methods.damping import Damping
from dtrak_kernels.ridge import RidgeSolver


@pytest.fixture(scope="module")
def solver():
    return RidgeSolver(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * 3)


def test_a_number_is_in_units_of_the_gram(solver):
    assert Damping.parse("1e-3").resolve(solver) == 1e-3
    assert Damping.parse(2).resolve(solver) == 2.0


def test_x_counts_mean_squared_feature_norms(solver):
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double() * 3
    unit = sum(float(row @ row) for row in features) / 20
    for text, factor in (("1x", 1.0), ("0.1x", 0.1), ("0x", 0.0)):
        assert Damping.parse(text).resolve(solver) == pytest.approx(factor * unit, rel=1e-6)


def test_auto_is_the_solvers_own(solver):
    assert Damping.parse("auto").resolve(solver) == solver.auto_damping()


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "", "x", "-1x", "1xx", "infx"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=f"or one such as 1x, got '{text}'"):
        Damping.parse(text)
