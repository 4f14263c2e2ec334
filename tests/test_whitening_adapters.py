"""A whitening per checkpoint, in the projectors for TRAK and dattri."""

import pytest
import torch
from dense_whitening import dense_map, dense_whitened
from numerics import relative_error
from test_sketcher import looped_gradients
from torch import nn

from dtrak_kernels import Projection, Whitening, project
from dtrak_kernels.dattri import DattriProjector
from dtrak_kernels.trak import FusedGradientComputer, TritonProjector


class Squares:
    """A task of TRAK's with an output for the whole batch."""

    def get_batch_output(self, model, x):
        return squares(model, x)


def squares(model, x):
    return model(x).square().mean(1)


def checkpoint(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


@pytest.fixture(scope="module")
def problem():
    """Two checkpoints, their whitenings, and the whitened gradients of other samples."""
    models = {0: checkpoint(0), 7: checkpoint(1)}
    x, y = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(3)).double()
    whitenings, expected = {}, {}
    for key, model in models.items():
        batches = [(lambda model=model: squares(model, x), 8)]
        whitenings[key] = Whitening.fit(model, batches, kind="kfac")
        maps, _ = dense_map(model, squares, (x,), looped_gradients(model, squares, (x,), 1), "kfac")
        expected[key] = dense_whitened(looped_gradients(model, squares, (y,), 1), maps)
    return models, whitenings, y, expected


def as_dict(model, grads):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = grads.split([shape.numel() for shape in shapes.values()], dim=1)
    return {n: p.unflatten(1, s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_trak(kind, problem):
    models, whitenings, y, expected = problem
    projector = TritonProjector(64, 300, 3, kind, "cpu", whitenings=whitenings)
    for key, model in models.items():
        shapes = [tuple(p.shape) for p in model.parameters()]
        scale = 1.0 if kind == "rademacher" else None
        oracle = project(expected[key], projector.projection(key), shapes=shapes, scale=scale)
        computer = FusedGradientComputer(model, Squares())
        deferred = computer.compute_per_sample_grad([y])
        assert relative_error(projector.project(deferred, key), oracle) < 1e-9
        grads = looped_gradients(model, squares, (y,), 1)
        assert relative_error(projector.project(as_dict(model, grads), key), oracle) < 1e-9
        if kind != "sjlt":
            assert relative_error(projector.project(grads, key), oracle) < 1e-9
        # the sketcher is kept, and another whitening makes another
        kept = computer.sketcher(projector.projection(key), None, whitenings[key])
        assert kept is computer.sketcher(projector.projection(key), None, whitenings[key])
        assert kept is not computer.sketcher(projector.projection(key), None)


def test_dattri(problem):
    models, whitenings, y, expected = problem
    projector = DattriProjector(64, 32, 3, "normal", "cpu", whitenings=whitenings)
    for key, model in models.items():
        grads = looped_gradients(model, squares, (y,), 1)
        oracle = project(expected[key], Projection("normal", 32, (key << 32) + 3))
        assert relative_error(projector.project(as_dict(model, grads), key), oracle) < 1e-9
        assert relative_error(projector.project(grads, key), oracle) < 1e-9


def test_refusals(problem):
    models, whitenings, y, _ = problem
    projector = TritonProjector(64, 32, 3, "normal", "cpu", whitenings=whitenings)
    grads = looped_gradients(models[0], squares, (y,), 1)
    with pytest.raises(ValueError, match=r"have one for model_id 1, got those of \[0, 7\]"):
        projector.project(grads, 1)
    deferred = FusedGradientComputer(models[0], Squares()).compute_per_sample_grad([y])
    with pytest.raises(ValueError, match="must be of this model, got one fitted to other weights"):
        projector.project(deferred, 7)
    named = as_dict(models[0], grads)
    with pytest.raises(ValueError, match=r"the whitening's parameters \['0\.weight', '0\.bias'"):
        projector.project({f"model.{name}": part for name, part in named.items()}, 0)
    named["0.weight"] = named["0.weight"].transpose(1, 2)
    with pytest.raises(ValueError, match=r"must have '0\.weight' \[6, 5\], got \[5, 6\]"):
        projector.project(named, 0)
    member = DattriProjector(64, 32, 3, "normal", "cpu", whitenings=whitenings)
    with pytest.raises(ValueError, match="have one for ensemble_id 2"):
        member.project(grads, 2)
