"""Slices of gradients that wait to be scattered, and contractions that are chosen once."""

from unittest.mock import Mock

import pytest
import torch
from numerics import relative_error
from torch import nn

from dtrak_kernels import GradientSketcher, Projection
from dtrak_kernels.gradients import accumulator as accumulators_module
from dtrak_kernels.gradients import weight as weight_gradient_module
from dtrak_kernels.gradients.accumulator import make_accumulator
from dtrak_kernels.gradients.weight import LayerGradient
from dtrak_kernels.sjlt.torch import as_matrix, sketch_parameters

SHAPES = [(300, 40), (7,), (140, 7, 3, 3), (5, 6)]
SJLT = Projection("sjlt", 5000, 9)


def gradients():
    torch.manual_seed(0)
    return [torch.randn(3, *shape, dtype=torch.float64) for shape in SHAPES]


def expected_features(grads):
    out = torch.zeros(3, 5000, dtype=torch.float64)
    for sketch, part in zip(sketch_parameters(SHAPES, 5000, 9), grads, strict=True):
        if part.ndim == 2:
            sketch.add_vector(part, out)
        else:
            sketch.add_matrix(as_matrix(part), out)
    return out


@pytest.mark.parametrize("most", [0, 2**13, 2**30])
@pytest.mark.parametrize("workspace", [100, 2**16, 2**30])
@pytest.mark.parametrize("columns_last", [False, True])
def test_slices_that_wait_are_all_there_in_the_end(most, workspace, columns_last, monkeypatch):
    monkeypatch.setattr(accumulators_module, "MOST_WAITING_BYTES", most)
    monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
    grads = gradients()
    out = torch.zeros(3, 5000, dtype=torch.float64)
    accumulator = make_accumulator(SHAPES, SJLT)
    accumulator.open(out)
    largest = 0
    for index, part in enumerate(grads):
        if part.ndim == 2:
            accumulator.add(index, part, out, slice(0, 3))
            continue
        if columns_last:
            part = part.movedim(2, -1).contiguous().movedim(-1, 2)
        step = accumulator.row_multiple(index)
        for first in range(0, part.shape[1], step):
            rows = part[:, first : first + step]
            accumulator.add(index, rows, out, slice(0, 3), first)
            largest = max(largest, rows.nbytes)
            waiting = sum(entries.nbytes for _, _, entries in accumulator._waiting)
            # never more than the workspace
            assert waiting <= workspace
            assert most or not waiting
    if workspace == most == 2**30:
        assert accumulator._waiting
    accumulator.close(out)
    assert not accumulator._waiting
    assert relative_error(out, expected_features(grads)) < 1e-14


def test_some_of_the_samples_do_not_wait():
    grads = gradients()
    out = torch.zeros(3, 5000, dtype=torch.float64)
    accumulator = make_accumulator(SHAPES, SJLT)
    accumulator.open(out)
    for index, part in enumerate(grads):
        for sample in range(3):
            accumulator.add(index, part[sample, None], out, slice(sample, sample + 1))
    assert not accumulator._waiting
    assert relative_error(out, expected_features(grads)) < 1e-14


def test_a_small_slice_of_a_large_weight_makes_no_table():
    shape = (2**12, 64)
    accumulator = make_accumulator([shape], SJLT)
    out = torch.zeros(2, 5000)
    accumulator.open(out)
    step = accumulator.row_multiple(0)
    rows = torch.randn(2, step, 64)
    assert rows.nbytes <= accumulators_module.MOST_WAITING_BYTES
    accumulator.add(0, rows, out, slice(0, 2), step)
    accumulator.close(out)
    (sketch,) = sketch_parameters([shape], 5000, 9)
    expected = torch.zeros(2, 5000)
    sketch.add_matrix(rows, expected, step)
    assert torch.equal(out, expected)
    assert not accumulator.sketches[0]._tables


def test_a_batch_that_failed_leaves_nothing_for_the_next():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    sketcher = GradientSketcher(model, Projection("sjlt", 256))
    expected = sketcher.sketch(lambda: model(x).square().sum(1), 5)

    def fail():
        with sketcher.batch(5):
            model(x).square().sum().backward()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.equal(sketcher.sketch(lambda: model(x).square().sum(1), 5), expected)


@pytest.mark.parametrize("kind", ["sjlt", "kronecker", "none", "rademacher"])
def test_one_sketcher_takes_batches_of_any_shape(kind):
    """How a layer's gradient is made is decided once for every shape, not once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))
    projection = Projection(kind, 0 if kind == "none" else 256)
    used = GradientSketcher(model, projection)
    for size in ((2, 5), (2, 3), (4, 5), (40, 32), (2, 5)):
        x = torch.randn(size[0], 3, size[1], size[1])

        def outputs(x=x):
            return model(x).square().flatten(1).mean(1)

        fresh = GradientSketcher(model, projection).sketch(outputs, len(x))
        assert torch.equal(used.sketch(outputs, len(x)), fresh)
        model.double()
        x = x.double()
        single = GradientSketcher(model, projection).sketch(lambda x=x: outputs(x), len(x))
        model.float()
        assert relative_error(fresh.double(), single) < 1e-5


@pytest.mark.parametrize("layer", [nn.Linear(9, 40), nn.Conv2d(9, 8, 3, padding=1)], ids=str)
def test_gradients_made_at_once_fit_the_workspace(layer, monkeypatch):
    x = torch.randn(16, 9) if isinstance(layer, nn.Linear) else torch.randn(16, 9, 6, 6)
    grads = torch.randn_like(layer(x))
    whole = 16 * layer.weight.nbytes
    # a sketch wants whole rows of tiles, which a quarter of all samples is
    for workspace in (whole, whole // 4):
        monkeypatch.setitem(weight_gradient_module.WORKSPACE_BYTES, "cpu", workspace)
        accumulator = make_accumulator([layer.weight.shape], Projection("sjlt", 256))
        add = Mock()
        monkeypatch.setattr(accumulator, "add", add)
        accumulator.add_weight(0, LayerGradient(layer, x, grads), torch.zeros(16, 256))
        sizes = [call.args[1].nbytes for call in add.call_args_list]
        assert sum(sizes) == whole
        assert max(sizes) == workspace
