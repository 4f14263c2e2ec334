"""A batch leaves nothing behind: no tensor, no gradient, whatever ended it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dtrak_kernels import GradientSketcher, Projection
from dtrak_kernels.gradients import accumulator as accumulators_module
from dtrak_kernels.gradients import hooks as calls_module

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


def stop():
    raise ZeroDivisionError


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_goes_with_the_graph(kind, tensors):
    model, x = layers(), torch.randn(5, 4, 7)
    sketcher = GradientSketcher(model, Projection(kind, 0 if kind == "none" else 256))
    sketcher.sketch(lambda: output(model, x), 5)
    with pytest.raises(ZeroDivisionError):
        sketcher.sketch(lambda: (output(model, x), stop()), 5)
    gc.collect()
    assert len(tensors) >= 10
    assert not any(reference() is not None for reference in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_goes_with_its_backward(kind, tensors):
    """The caller may hold a result, and with it the graph, until the next batch."""
    model, x = layers(), torch.randn(5, 4, 7)
    sketcher = GradientSketcher(model, Projection(kind, 0 if kind == "none" else 256))
    with sketcher.batch(5):
        held = output(model, x).sum()
        held.backward(retain_graph=True)
        assert any(reference() is not None for reference in tensors)
        held.backward()
        assert held.grad_fn is not None
        assert not any(reference() is not None for reference in tensors)


def test_a_second_backward_of_what_is_gone():
    """Autograd keeps nothing of such a graph, and would not notice."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    sketcher = GradientSketcher(model, Projection("none", 0))

    def twice():
        with sketcher.batch(5):
            f = model(x).sum()
            f.backward()
            f.backward()

    with pytest.raises(RuntimeError, match=r"second backward went through module 'Linear' \(Line"):
        twice()


@pytest.mark.parametrize("kind", ["sjlt", "kronecker"])
def test_nothing_waits_and_no_gradient_is_held_after_a_batch(kind):
    model, x = nn.Linear(6, 6), torch.randn(5, 6)
    sketcher = GradientSketcher(model, Projection(kind, 256), norms=True)
    accumulator = sketcher._accumulator

    def interrupted():
        output(lambda x: model(model(x)), x).sum().backward()
        assert accumulator.accumulator._waiting
        assert accumulator._held
        raise KeyboardInterrupt

    def run():
        with sketcher.batch(5):
            interrupted()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not accumulator.accumulator._waiting
    assert not accumulator._held
    sketcher.sketch(lambda: output(lambda x: model(model(x)), x), 5)
    assert not accumulator._held


def test_sequences_of_any_length_are_not_all_remembered(monkeypatch):
    monkeypatch.setattr(accumulators_module, "MOST_DECISIONS", 8)
    model = nn.Linear(4, 3)
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    for length in range(1, 20):
        x = torch.randn(2, length, 4)
        sketcher.sketch(lambda x=x: output(model, x), 2)
        assert len(sketcher._accumulator._contractions) <= 8
