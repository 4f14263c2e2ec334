"""Every attribution method against its formula, written out in dense float64 algebra."""

import numpy as np
import pytest
import torch
from numerics import relative_error

from dtrak.methods import scores
from dtrak_kernels.ridge import RidgeSolver

SHAPES = [(11, 23, 4), (23, 11, 4), (1, 3, 2)]
DAMPINGS = [1e-3, 0.7, 50.0]


def rows(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


class Store:
    def __init__(self, features):
        self.features, self.shape = features, features.shape

    def __getitem__(self, part):
        return self.features[part].numpy()


def dense(features, queries, damping):
    """``(scores, (ΦᵀΦ + λI)⁻¹ φ_i as rows)`` in numpy float64, from an explicit inverse."""
    phi, x = features.double().numpy(), queries.double().numpy()
    preconditioned = phi @ np.linalg.inv(phi.T @ phi + damping * np.eye(phi.shape[1]))
    return x @ preconditioned.T, preconditioned


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("N, K, M", SHAPES)
def test_methods_on_the_inverse(N, K, M, damping):
    features, queries = rows(N, K), rows(M, K, seed=1)
    solver = RidgeSolver(features)
    expected, preconditioned = dense(features, queries, damping)
    lengths = np.linalg.norm(features.double().numpy(), axis=1)
    for method, oracle in (
        (scores.trak, expected),
        (scores.relative_influence, expected / np.linalg.norm(preconditioned, axis=1)),
        (scores.renormalised_influence, expected / lengths),
    ):
        actual = method(solver, queries, damping)
        assert actual.dtype == torch.float32
        assert relative_error(actual, torch.from_numpy(oracle)) < 1e-6, method.__name__


def similarity(queries, features, cosine):
    out = torch.zeros(len(queries), len(features), dtype=torch.float64)
    for m, query in enumerate(queries.double()):
        for n, row in enumerate(features.double()):
            out[m, n] = query @ row / (query.norm() * row.norm() if cosine else 1.0)
    return out


@pytest.mark.parametrize("kind", [lambda features: features, Store], ids=["tensor", "store"])
@pytest.mark.parametrize("N, K, M", SHAPES)
def test_methods_without_an_inverse(N, K, M, kind, monkeypatch):
    monkeypatch.setattr(scores, "_BLOCK_BYTES", 8 * K * 4)
    queries = [rows(M, K, seed=10 + c) for c in range(3)]
    features = [rows(N, K, seed=20 + c) for c in range(3)]
    stores = [kind(part) for part in features]
    dots = [similarity(q, f, cosine=False) for q, f in zip(queries, features, strict=True)]
    cosines = [similarity(q, f, cosine=True) for q, f in zip(queries, features, strict=True)]
    for actual, oracle in (
        (scores.gradient_dot(queries[0], stores[0]), dots[0]),
        (scores.gradient_cosine(queries[0], stores[0]), cosines[0]),
        (scores.tracin_cp(queries, stores), sum(dots) / 3),
        (scores.gas(queries, stores), sum(cosines) / 3),
    ):
        assert actual.dtype == torch.float32
        assert relative_error(actual, oracle) < 1e-6


def test_zero_features_score_zero_under_every_method():
    features, queries = rows(6, 4), rows(3, 4, seed=1)
    features[2] = 0.0
    queries[1] = 0.0
    solver = RidgeSolver(features)
    for matrix in (
        scores.trak(solver, queries, 0.1),
        scores.relative_influence(solver, queries, 0.1),
        scores.renormalised_influence(solver, queries, 0.1),
        scores.gradient_dot(queries, features),
        scores.gradient_cosine(queries, features),
    ):
        assert torch.isfinite(matrix).all()
        assert torch.equal(matrix[:, 2], torch.zeros(3))
        assert torch.equal(matrix[1], torch.zeros(6))
        assert float(matrix[0, 0].abs()) > 0.0


def test_positive_is_proponent():
    # the query's own gradient is in the training set, and its opposite
    features = rows(5, 40)
    features[3] = -features[1]
    query = features[1:2]
    solver = RidgeSolver(features)
    for matrix in (
        scores.trak(solver, query, 1.0),
        scores.relative_influence(solver, query, 1.0),
        scores.renormalised_influence(solver, query, 1.0),
        scores.gradient_dot(query, features),
        scores.gradient_cosine(query, features),
    ):
        best = scores.top_k(matrix, 1)
        assert (best.proponents.item(), best.opponents.item()) == (1, 3)
        assert best.proponent_scores.item() > 0.0 > best.opponent_scores.item()


def test_journey_averages_the_steps_of_the_query():
    steps = torch.stack([rows(3, 7, seed=s) for s in range(5)])
    expected = sum(steps.double()[s] for s in range(5)) / 5
    assert relative_error(scores.journey_query_features(steps), expected) < 1e-6
    features = rows(9, 7, seed=9)
    # scores are linear in the query: averaging features is averaging scores
    solver = RidgeSolver(features)
    averaged = sum(dense(features, steps[s], 0.3)[0] for s in range(5)) / 5
    actual = scores.trak(solver, scores.journey_query_features(steps), 0.3)
    assert relative_error(actual, torch.from_numpy(averaged)) < 1e-6


def test_ensemble_is_the_mean_of_scores():
    matrices = [rows(4, 6, seed=s) for s in range(3)]
    expected = sum(matrix.double() for matrix in matrices) / 3
    assert relative_error(scores.ensemble(matrices), expected) < 1e-6
    assert relative_error(scores.ensemble(iter(matrices)), expected) < 1e-6
    assert torch.equal(scores.ensemble(matrices[:1]), matrices[0])


def test_bad_input_is_refused():
    queries, features = rows(2, 3), rows(4, 3)
    for method in (scores.gradient_dot, scores.gradient_cosine):
        with pytest.raises(ValueError, match=r"queries must be \[M, 3\], got shape \(2, 5\)"):
            method(rows(2, 5), features)
    for method in (scores.tracin_cp, scores.gas):
        with pytest.raises(ValueError, match="one entry per checkpoint, got 1 and 2"):
            method([queries], [features, features])
        with pytest.raises(ValueError, match="one entry per checkpoint, got 0 and 0"):
            method([], [])
    with pytest.raises(ValueError, match="at least one matrix, got none"):
        scores.ensemble([])
    with pytest.raises(ValueError, match=r"must all be \[2, 3\], got \[4, 3\] at number 1"):
        scores.ensemble([queries, features])
    for shape in ((3, 4), (0, 3, 4)):
        with pytest.raises(ValueError, match=r"step_features must be \[S, M, K\] with S >= 1"):
            scores.journey_query_features(torch.ones(shape))
    for method in (scores.trak, scores.relative_influence, scores.renormalised_influence):
        with pytest.raises(ValueError, match="damping must be finite and at least 0, got -1"):
            method(RidgeSolver(features), queries, -1.0)
