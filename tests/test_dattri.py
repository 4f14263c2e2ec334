"""The projector for dattri, by its documented interface: the library is not needed."""

import sys
from enum import StrEnum

import pytest
import torch
from numerics import relative_error

from dtrak_kernels import Projection, project
from dtrak_kernels.dattri import DattriProjector, install
from dtrak_kernels.dense import reference


class TheirType(StrEnum):
    normal = "normal"
    sjlt = "sjlt"


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ensemble_id", [0, 3])
def test_features_are_divided_by_root_k(ensemble_id):
    made = DattriProjector(
        feature_dim=120,
        proj_dim=16,
        seed=5,
        proj_type=TheirType.normal,
        device="cpu",
        dtype=torch.float32,
        grass_multiplier=4,
    )
    grads = {"a": gaussian(3, 10, 10), "b": gaussian(3, 20, seed=1)}
    flat = torch.cat([x.flatten(1) for x in grads.values()], dim=1)
    matrix = reference.normal_matrix(120, 16, 5 + (ensemble_id << 32))
    expected = flat.double() @ matrix / 4
    assert relative_error(made.project(grads, ensemble_id), expected) < 1e-6
    assert relative_error(made.project(flat, ensemble_id=ensemble_id), expected) < 1e-6
    made.free_memory()
    assert made.proj_type == "normal"
    assert (made.feature_dim, made.proj_dim, made.seed, made.device) == (120, 16, 5, "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_gradients(dtype):
    made = DattriProjector(50, 64, 0, "rademacher", torch.device("cpu"))
    grads = torch.round(2 * gaussian(4, 50)).to(dtype)
    features = made.project(grads, 0)
    assert features.dtype == dtype
    exact = grads.double() @ reference.rademacher_matrix(50, 64, 0).double() / 8
    assert torch.equal(features, exact.to(dtype))


def test_sparse_kind_needs_parameters():
    made = DattriProjector(1200 + 9, 1024, 3, TheirType.sjlt, "cpu")
    grads = {"a": gaussian(2, 40, 30), "b": gaussian(2, 9)}
    flat = torch.cat([x.flatten(1) for x in grads.values()], dim=1)
    expected = project(flat, Projection("sjlt", 1024, 3), shapes=[(40, 30), (9,)])
    assert torch.equal(made.project(grads, 0), expected)
    with pytest.raises(ValueError, match="grads must be a dict of parameters for kind 'sjlt'"):
        made.project(flat, 0)


def test_refusals():
    with pytest.raises(
        ValueError, match="proj_type must be one of rademacher, normal, sjlt, got 'random_mask'"
    ):
        DattriProjector(10, 16, 0, "random_mask", "cpu")
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*32\), got -1"):
        DattriProjector(10, 16, -1, "normal", "cpu")
    made = DattriProjector(10, 16, 0, "normal", "cpu")
    with pytest.raises(ValueError, match=r"ensemble_id must be in \[0, 2\*\*31\), got -1"):
        made.project(torch.ones(1, 10), -1)
    with pytest.raises(ValueError, match="grads must have grad_dim = 10 columns, got 7"):
        made.project(torch.ones(1, 7), 0)
    with pytest.raises(TypeError, match=r"grads must be float32.*int64"):
        made.project(torch.ones(1, 10).long(), 0)


def test_install_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "dattri", None)
    with pytest.raises(ImportError, match="dattri"):
        install()
