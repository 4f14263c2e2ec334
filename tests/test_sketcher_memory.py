"""A batch leaves nothing behind: no tensor, no gradient, whatever ended it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dtrak_kernels import GradientSketcher, Projection
from dtrak_kernels import calls as calls_module

KINDS = ["none", "sjlt", "kronecker", "rademacher"]


def output(model, x):
    return model(x).tanh().flatten(1).square().mean(1)


@pytest.fixture
def tensors(monkeypatch):
    """Weak references to every tensor that a layer's forward left for its backward."""
    kept, keep = [], calls_module._keep

    def noted(anchor, tensors):
        kept.extend(weakref.ref(t) for t in tensors)
        return keep(anchor, tensors)

    monkeypatch.setattr(calls_module, "_keep", noted)
    return kept


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.PReLU(6), nn.Conv1d(6, 4, 1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_goes_with_the_graph(kind, tensors):
    model, x = layers(), torch.randn(5, 4, 7)
    sketcher = GradientSketcher(model, Projection(kind, 0 if kind == "none" else 256))
    sketcher.sketch(lambda: output(model, x), 5)
    with pytest.raises(ZeroDivisionError), sketcher.batch(5):
        output(model, x)
        1 / 0  # noqa: B018
    gc.collect()
    assert len(tensors) >= 10
    assert not any(reference() is not None for reference in tensors)
