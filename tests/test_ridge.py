"""The regularised inverse against a 50-digit computation and float64 singular values."""

import math

import mpmath
import pytest
import torch
from numerics import relative_error

from dtrak_kernels.ridge import METHODS, RidgeSolver, cholesky, plan_ridge, top_k
from dtrak_kernels.ridge import factors as ridge_factors
from dtrak_kernels.ridge import iteration as ridge_iteration
from dtrak_kernels.ridge import rows as ridge_rows
from dtrak_kernels.ridge.ranking import rank_blocks

FACTORISED = ("primal", "dual", "svd")
SHAPES = [(12, 30), (30, 12), (16, 16), (1, 5), (5, 1)]
# what D-TRAK's notebooks try: {1, 2, 5} x 10^j for j = -2 .. 6
SWEEP = [m * 10.0**j for j in range(-2, 7) for m in (1, 2, 5)]


def rows(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def oracle(features, queries, damping):
    """50 digits, straight from the definition: Q (ΦᵀΦ + λI)⁻¹ Φᵀ."""
    with mpmath.workdps(50):
        phi = mpmath.matrix(features.double().tolist())
        damped = phi.T * phi + mpmath.mpf(damping) * mpmath.eye(features.shape[1])
        scores = mpmath.matrix(queries.double().tolist()) * damped**-1 * phi.T
        return torch.tensor(
            [[float(scores[i, j]) for j in range(scores.cols)] for i in range(scores.rows)],
            dtype=torch.float64,
        )


def by_singular_values(features, queries, damping):
    u, sigma, vt = torch.linalg.svd(features.double(), full_matrices=False)
    keep = sigma > max(features.shape) * torch.finfo(torch.float64).eps * sigma[0]
    weight = torch.where(keep, sigma / (sigma**2 + damping), 0.0)
    return (queries.double() @ vt.T * weight) @ u.T


def deficient():
    """Rank 9 of [14, 20]: two copied rows, one sum of two others, one zero row, one multiple."""
    # eighths, so that the sum of two rows is exact
    features = (8 * rows(14, 20, seed=5)).round() / 8
    features[3] = features[0]
    features[7] = features[1]
    features[9] = 0.0
    features[11] = 2.0 * features[2]
    features[13] = features[4] + features[5]
    return features


class Store:
    """Rows on disk, as far as the solver can tell."""

    def __init__(self, features):
        self.features, self.shape = features, features.shape
        self.longest = 0

    def __getitem__(self, part):
        assert isinstance(part, slice)
        self.longest = max(self.longest, part.stop - part.start)
        return self.features[part].numpy()


# conjugate gradients promise a residual, which says little where λ is tiny
@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "method, damping",
    [(m, d) for m in (*METHODS, None) for d in (1e-6, 1e-2, 1.0, 1e4) if m != "cg" or d > 1e-6],
)
@pytest.mark.parametrize("N, K", SHAPES)
def test_every_method_gives_the_50_digit_scores(N, K, method, damping):
    features, queries = rows(N, K), rows(4, K, seed=1)
    expected = oracle(features, queries, damping)
    solver = RidgeSolver(features, method=method)
    actual = solver.scores(queries, damping)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(solver.scores_sweep(queries, [damping, 3.0])[0], expected) < 1e-6


@pytest.mark.sweep
@pytest.mark.parametrize("exponent", [*range(-40, 7, 2)])
@pytest.mark.parametrize("method", FACTORISED)
def test_rank_deficient_features_at_every_damping(method, exponent):
    features, queries = deficient(), rows(3, 20, seed=1)
    damping = 10.0**exponent
    # 50 digits do not separate 1e-40 from an exact zero; the limit does
    expected = (
        oracle(features, queries, damping)
        if exponent >= -20
        else by_singular_values(features, queries, damping)
    )
    actual = RidgeSolver(features, method=method).scores(queries, damping)
    assert torch.isfinite(actual).all()
    assert relative_error(actual, expected) < 1e-6
    assert (
        torch.equal(actual[:, 0], actual[:, 3]) or relative_error(actual[:, 0], actual[:, 3]) < 1e-6
    )
    assert float(actual[:, 9].abs().max()) < 1e-9 * float(actual.abs().max())


@pytest.mark.parametrize("exponent", range(-16, 3, 2))
@pytest.mark.parametrize("N, K", [(12, 16), (16, 12)])
def test_steep_spectrum_at_every_damping(N, K, exponent):
    # singular values over 7 decades: their squares span 14, more than a Gram's rounding allows
    R = min(N, K)
    u, _ = torch.linalg.qr(rows(N, R, seed=2).double())
    v, _ = torch.linalg.qr(rows(K, R, seed=3).double())
    features = (u * torch.logspace(0, -7, R, dtype=torch.float64)) @ v.T
    queries = rows(3, K, seed=1)
    expected = oracle(features, queries, 10.0**exponent)
    for method in FACTORISED:
        solver = RidgeSolver(features, method=method)
        assert relative_error(solver.scores(queries, 10.0**exponent), expected) < 1e-6


def test_published_float32_inverse_breaks_and_this_one_does_not():
    # N < K with a large common component, as D-TRAK's norm-based output gives
    N, K = 60, 300
    features = rows(N, K) + 30.0 * rows(1, K, seed=9)
    queries = rows(20, K, seed=1) + 30.0 * rows(1, K, seed=9)
    largest = float(torch.linalg.matrix_norm(features.double(), 2)) ** 2
    damping = 1e-9 * largest
    expected = by_singular_values(features, queries, damping)
    published = torch.linalg.inv(features.T @ features + damping * torch.eye(K))
    assert relative_error(queries @ published @ features.T, expected) > 1.0
    # the bound a true inverse of a rank-N Gram cannot cross, by which the notebooks give it away
    assert damping * float(published.diagonal().mean()) < 0.9 * (K - N) / K
    assert relative_error(RidgeSolver(features).scores(queries, damping), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N, K", [(12, 30), (30, 12)])
def test_sweep_equals_single_solves(N, K, method):
    features, queries = rows(N, K), rows(5, K, seed=1)
    dampings = SWEEP if method != "cg" else SWEEP[::9]
    sweep = RidgeSolver(features, method=method).scores_sweep(queries, dampings)
    assert sweep.shape == (len(dampings), 5, N)
    for scores, damping in zip(sweep, dampings, strict=True):
        single = RidgeSolver(features, method=method).scores(queries, damping)
        assert relative_error(scores, single) < 1e-6


def test_sweep_factorises_once(monkeypatch):
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: calls.append(1) or original(gram))
    solver = RidgeSolver(rows(12, 30))
    solver.scores_sweep(rows(2, 30), SWEEP)
    solver.scores_sweep(rows(2, 30), SWEEP)
    solver.leverages(1.0)
    assert len(calls) == 1


@pytest.mark.parametrize("method, name", [("primal", "cholesky"), ("cg", "nystrom_preconditioner")])
def test_preconditioned_makes_its_inverse_once(method, name, monkeypatch):
    calls = []
    module = ridge_factors if method == "primal" else ridge_iteration
    original = getattr(module, name)

    def count(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, count)
    # blocks of seven rows
    monkeypatch.setattr(ridge_rows, "BLOCK_BYTES", 8 * 12 * 7)
    RidgeSolver(rows(30, 12), method=method).preconditioned(0.5)
    assert len(calls) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N, K", [(29, 40), (40, 29)])
def test_blocks_do_not_matter(N, K, method, monkeypatch):
    features, queries = rows(N, K), rows(11, K, seed=1)
    expected = by_singular_values(features, queries, 0.5)
    monkeypatch.setattr(ridge_rows, "BLOCK_BYTES", 8 * K * 7)
    # rows for the dual, columns for its singular values, queries: all in small ragged blocks
    budget = 8 * 8 * K * 9
    store = Store(features)
    solver = RidgeSolver(store, method=method, memory_budget=budget)
    assert relative_error(solver.scores(queries, 0.5), expected) < 1e-6
    assert relative_error(solver.scores_sweep(queries, [0.5])[0], expected) < 1e-6
    assert (
        relative_error(
            solver.top_k(queries, N, 0.5).proponent_scores, expected.sort(descending=True).values
        )
        < 1e-6
    )
    if method != "cg":
        assert store.longest <= 9
        whole = RidgeSolver(features, method=method)
        assert relative_error(solver.leverages(0.5), whole.leverages(0.5)) < 1e-9
        assert solver.auto_damping() == pytest.approx(whole.auto_damping(), rel=1e-6)
        assert relative_error(solver.preconditioned(0.5), whole.preconditioned(0.5)) < 1e-6
        assert (
            relative_error(solver.inverse_times(queries, 0.5), whole.inverse_times(queries, 0.5))
            < 1e-9
        )
        assert relative_error(solver.feature_norms(), features.double().norm(dim=1)) < 1e-12


def test_refined_kernel_solutions_reach_the_tolerance(device):
    features, queries = rows(40, 24).to(device), rows(3, 24, seed=1).to(device)
    solver = RidgeSolver(features, method="cg", implementation="triton")
    expected = by_singular_values(features.cpu(), queries.cpu(), 0.1)
    assert relative_error(solver.scores(queries, 0.1), expected) < 1e-6


def test_refinement_leaves_to_float64_what_float32_cannot_do(device):
    # condition number 1e9
    u, _ = torch.linalg.qr(rows(24, 24, seed=2).double())
    v, _ = torch.linalg.qr(rows(24, 24, seed=3).double())
    features = ((u * torch.logspace(0, -4.5, 24, dtype=torch.float64)) @ v.T).float().to(device)
    queries = rows(3, 24, seed=1).to(device)
    solver = RidgeSolver(features, method="cg", implementation="triton", max_iterations=60)
    expected = by_singular_values(features.cpu(), queries.cpu(), 1e-8)
    assert relative_error(solver.scores(queries, 1e-8), expected) < 1e-5


def test_conjugate_gradients_that_do_not_converge_say_the_residual(monkeypatch):
    monkeypatch.setattr(ridge_iteration, "preconditioner_rank", lambda N, K: 1)
    solver = RidgeSolver(rows(40, 60), method="cg", max_iterations=2)
    with pytest.raises(ValueError, match=r"relative residual of 1e-09, got \d\.\d+e.\d+ after 2"):
        solver.scores(rows(2, 60, seed=1), 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_top_k_is_that_of_the_full_matrix(method, monkeypatch):
    features, queries = deficient(), rows(6, 20, seed=1)
    monkeypatch.setattr(ridge_rows, "BLOCK_BYTES", 8 * 20 * 4)
    scores = RidgeSolver(features, method=method).scores(queries, 1.0)
    actual = RidgeSolver(features, method=method).top_k(queries, 5, 1.0)
    for query in range(6):
        high = sorted(range(14), key=lambda i: -scores[query, i])[:5]
        low = sorted(range(14), key=lambda i: scores[query, i])[:5]
        assert actual.proponent_scores[query].tolist() == pytest.approx(
            scores[query, high].tolist(), rel=1e-5
        )
        assert actual.opponent_scores[query].tolist() == pytest.approx(
            scores[query, low].tolist(), rel=1e-5
        )
        for indices, values in (
            (actual.proponents, actual.proponent_scores),
            (actual.opponents, actual.opponent_scores),
        ):
            assert scores[query, indices[query]].tolist() == pytest.approx(
                values[query].tolist(), rel=1e-5
            )


@pytest.mark.parametrize("method", METHODS)
def test_no_queries_have_no_scores(method):
    solver = RidgeSolver(rows(6, 9), method=method)
    assert solver.scores(rows(0, 9), 1.0).shape == (0, 6)
    assert solver.scores_sweep(rows(0, 9), [1.0, 2.0]).shape == (2, 0, 6)
    best = solver.top_k(rows(0, 9), 2, 1.0)
    for part in (best.proponents, best.proponent_scores, best.opponents, best.opponent_scores):
        assert part.shape == (0, 2)


def test_top_k_breaks_ties_by_row_number():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 1.0, 0.0, 3.0]])
    best = top_k(scores, 4)
    assert best.proponents.tolist() == [[1, 2, 6, 0]]
    assert best.opponents.tolist() == [[3, 5, 0, 4]]
    assert best.proponent_scores.tolist() == [[3.0, 3.0, 3.0, 1.0]]
    assert best.opponent_scores.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_top_k_of_wide_rows_is_a_stable_sort():
    scores = rows(3, 200)
    tied = (2 * scores).round() / 2
    for matrix in (scores, tied):
        best = top_k(matrix, 6)
        for query in range(3):
            high = sorted(range(200), key=lambda i: (-float(matrix[query, i]), i))[:6]
            low = sorted(range(200), key=lambda i: (float(matrix[query, i]), i))[:6]
            assert best.proponents[query].tolist() == high
            assert best.opponents[query].tolist() == low
            assert torch.equal(best.proponent_scores[query], matrix[query, high])


@pytest.mark.parametrize("size", [3, 70])
def test_top_k_of_blocks_breaks_ties_by_row_number(size):
    tied = (2 * rows(3, 200)).round() / 2
    whole, best = top_k(tied, 6), rank_blocks(tied.split(size, dim=1), 6)
    assert torch.equal(best.proponents, whole.proponents)
    assert torch.equal(best.opponents, whole.opponents)
    assert torch.equal(best.proponent_scores, whole.proponent_scores)
    assert torch.equal(best.opponent_scores, whole.opponent_scores)


def test_top_k_never_holds_the_score_matrix():
    N, K, M = 20000, 4, 3
    solver = RidgeSolver(Store(rows(N, K)), method="primal", memory_budget=64 * 8 * K * 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    queries = rows(M, K, seed=1)
    with Watch():
        solver.top_k(queries, 5, 1.0)
    assert 0 < max(sizes) <= 64 * 8 * K < M * N


def test_scores_can_be_written_in_place(tmp_path):
    features, queries = rows(9, 12), rows(4, 12, seed=1)
    for method in ("primal", "dual"):
        file = torch.from_file(str(tmp_path / method), shared=True, size=36).view(4, 9)
        solver = RidgeSolver(features, method=method)
        assert solver.scores(queries, 0.5, out=file) is file
        assert torch.equal(file, solver.scores(queries, 0.5))
    with pytest.raises(ValueError, match=r"out must be \[4, 9\] float32, got \[9, 4\]"):
        solver.scores(queries, 0.5, out=torch.empty(9, 4))


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("damping", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("N, K", [(12, 30), (30, 12)])
def test_diagonal_quantities(N, K, damping, method):
    features = rows(N, K)
    phi = features.double()
    u, sigma, vt = torch.linalg.svd(phi, full_matrices=False)
    solver = RidgeSolver(features, method=method)
    leverages = (u**2) @ (sigma**2 / (sigma**2 + damping))
    assert relative_error(solver.leverages(damping), leverages) < 1e-9
    inverted = (u * (sigma / (sigma**2 + damping))) @ vt
    assert relative_error(solver.preconditioned_norms(damping), inverted.norm(dim=1)) < 1e-7
    assert relative_error(solver.preconditioned(damping), inverted) < 1e-6


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("N, K", [(9, 14), (14, 9)])
def test_inverse_times_is_the_dense_inverse(N, K, method):
    features, queries = rows(N, K), rows(3, K, seed=1)
    damped = features.double().T @ features.double() + 0.1 * torch.eye(K, dtype=torch.float64)
    expected = torch.linalg.solve(damped, queries.double().T).T
    actual = RidgeSolver(features, method=method).inverse_times(queries, 0.1)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("method", [*FACTORISED, None])
@pytest.mark.parametrize("N, K", [(9, 9), (14, 9)])
def test_inverse_times_without_damping(N, K, method):
    features, queries = rows(N, K), rows(3, K, seed=1)
    phi = features.double()
    expected = torch.linalg.solve(phi.T @ phi, queries.double().T).T
    actual = RidgeSolver(features, method=method).inverse_times(queries, 0.0)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("N, K", [(9, 14), (14, 9)])
def test_leave_one_out_is_leaving_one_out(N, K, columns, method):
    features = rows(N, K)
    shape = (N,) if columns is None else (N, columns)
    targets = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    actual = RidgeSolver(features, method=method).leave_one_out_residuals(targets, 0.3)
    phi, y = features.double(), targets.double().reshape(N, -1)
    for i in range(N):
        others = torch.arange(N) != i
        damped = phi[others].T @ phi[others] + 0.3 * torch.eye(K, dtype=torch.float64)
        weights = torch.linalg.solve(damped, phi[others].T @ y[others])
        assert relative_error(actual[i].reshape(-1), y[i] - phi[i] @ weights) < 1e-9


def spiked(N=60, K=90, noise=0.3, seed=0):
    """Features as gradients are: a decaying signal, and noise in every direction."""
    signal = rows(N, 20, seed) * torch.logspace(0.5, -1, 20) @ rows(20, K, seed + 1)
    return signal + noise * rows(N, K, seed + 2)


def held_out_density(features, damping):
    """-2 log density of each group of equal rows under the rest, straight from the definition."""
    phi = features.double()
    phi = phi[(phi != 0).any(dim=1)]
    _, sigma, vt = torch.linalg.svd(phi, full_matrices=False)
    rank = int((sigma > 1e-10 * sigma[0]).sum())
    coordinates = phi @ vt[:rank].T
    total = 0.0
    for row in coordinates:
        same = ((coordinates - row).abs().max(dim=1).values) < 1e-9 * sigma[0]
        rest = coordinates[~same]
        damped = rest.T @ rest + damping * torch.eye(rank, dtype=torch.float64)
        total += torch.logdet(damped) + len(rest) * row @ torch.linalg.solve(damped, row)
    return float(total) / len(coordinates)


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("N, K", [(30, 50), (50, 30)])
def test_auto_damping_is_the_best_held_out_density(N, K, method):
    features = spiked(N, K)
    features[5] = features[4]
    features[8] = 0.0
    best = RidgeSolver(features, method=method).auto_damping()
    at_best = held_out_density(features, best)
    for factor in (1e-6, 1e-3, 0.1, 0.8, 0.97, 1.03, 1.25, 10.0, 1e3):
        assert held_out_density(features, factor * best) > at_best


@pytest.mark.parametrize("N, K", [(60, 90), (90, 60), (200, 10), (10, 200)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_auto_damping_is_inside_the_spectrum(N, K, noise):
    features = spiked(N, K, noise)
    largest = float(torch.linalg.matrix_norm(features.double(), 2)) ** 2
    assert 1e-9 * largest < RidgeSolver(features).auto_damping() < 3.0 * largest


def test_auto_damping_finds_the_noise():
    # a few strong directions in noise of variance 0.25: N times that is the noise part of the Gram
    N, K = 400, 40
    features = 0.5 * rows(N, K, 2)
    features[:, :3] += 5.0 * rows(N, 3, 4)
    assert 0.02 * N * 0.25 < RidgeSolver(features).auto_damping() < 2.0 * N * 0.25
    noisier = features + 1.5 * rows(N, K, 6)
    assert RidgeSolver(noisier).auto_damping() > 4.0 * RidgeSolver(features).auto_damping()


@pytest.mark.parametrize("N, K", [(60, 90), (90, 60)])
def test_auto_damping_symmetries(N, K):
    features = spiked(N, K)
    base = RidgeSolver(features).auto_damping()
    assert RidgeSolver(8.0 * features).auto_damping() == pytest.approx(64.0 * base, rel=1e-9)
    assert RidgeSolver(1e-3 * features).auto_damping() == pytest.approx(1e-6 * base, rel=1e-3)
    assert RidgeSolver(torch.cat([features, features])).auto_damping() == pytest.approx(2.0 * base)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert RidgeSolver(features[order]).auto_damping() == pytest.approx(base, rel=1e-6)
    padded = torch.cat([features, torch.zeros(N, 70)], dim=1)
    assert RidgeSolver(padded).auto_damping() == pytest.approx(base, rel=1e-6)
    zero = torch.cat([features, torch.zeros(3, K)])
    assert RidgeSolver(zero).auto_damping() == pytest.approx(base, rel=1e-6)
    some = torch.cat([features, features[:6], features[:2]])
    assert 0.5 * base < RidgeSolver(some).auto_damping() < 2.0 * base


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("N, K", [(40, 60), (60, 40)])
def test_auto_damping_for_targets_is_generalised_cross_validation(N, K, method):
    features = rows(N, K)
    weights = rows(K, 2, seed=3)
    targets = features @ weights + 4.0 * rows(N, 2, seed=4)
    best = RidgeSolver(features, method=method).auto_damping(targets)
    phi, y = features.double(), targets.double()

    def criterion(damping):
        damped = phi.T @ phi + damping * torch.eye(K, dtype=torch.float64)
        left = torch.eye(N, dtype=torch.float64) - phi @ torch.linalg.solve(damped, phi.T)
        return float(N * (left @ y).square().sum() / left.trace() ** 2)

    for factor in (1e-3, 0.1, 0.9, 1.1, 10.0):
        assert criterion(factor * best) > criterion(best)


def test_auto_damping_refuses():
    with pytest.raises(ValueError, match=r"features must have a non-zero row .* got none"):
        RidgeSolver(torch.zeros(4, 3)).auto_damping()
    with pytest.raises(ValueError, match="auto_damping must come from a factorisation, got method"):
        RidgeSolver(rows(4, 3), method="cg").auto_damping()
    with pytest.raises(ValueError, match=r"targets must be \[4\] or \[4, C\], got shape \(3,\)"):
        RidgeSolver(rows(4, 3)).auto_damping(torch.ones(3))
    noise = rows(80, 40, seed=7)
    with pytest.raises(ValueError, match=r"targets must have a cross-validation minimum .* end"):
        RidgeSolver(noise).auto_damping(noise.double() @ rows(40, 1, seed=3).double())


@pytest.mark.parametrize("N, K", [(12, 30), (30, 12)])
def test_zero_damping(N, K):
    features, queries = rows(N, K), rows(3, K, seed=1)
    solver = RidgeSolver(features)
    assert solver.rank() == 12
    if N < K:
        with pytest.raises(ValueError, match="the Gram is singular, rank 12 of 30"):
            solver.scores(queries, 0.0)
    else:
        assert relative_error(solver.scores(queries, 0.0), oracle(features, queries, 0.0)) < 1e-6


def test_rank_is_named_where_the_gram_alone_would_miss_it():
    with pytest.raises(ValueError, match="the Gram is singular, rank 9 of 20"):
        RidgeSolver(deficient()).scores_sweep(rows(2, 20), [1.0, 0.0])
    # σ_min / σ_max = 1e-10: its square is below rounding, but the matrix is not singular
    graded = torch.diag(torch.logspace(0, -10, 6, dtype=torch.float64))
    assert RidgeSolver(graded).rank() == 6
    assert relative_error(RidgeSolver(graded).scores(graded, 0.0), torch.eye(6)) < 1e-6


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_must_be_finite_and_not_negative(damping):
    solver = RidgeSolver(rows(4, 3))
    for call in (
        lambda: solver.scores(rows(1, 3), damping),
        lambda: solver.scores_sweep(rows(1, 3), [1.0, damping]),
        lambda: solver.top_k(rows(1, 3), 1, damping),
        lambda: solver.leverages(damping),
        lambda: solver.preconditioned(damping),
    ):
        with pytest.raises(ValueError, match=f"must be finite and at least 0, got {damping}"):
            call()


def test_bad_input_is_named():
    features = rows(6, 3)
    features[4, 1] = float("nan")
    features[5, 1] = float("inf")
    for method in METHODS:
        with pytest.raises(ValueError, match=r"features must be finite, got NaN .* in row 4"):
            RidgeSolver(features, method=method).scores(rows(1, 3), 1.0)
    solver = RidgeSolver(rows(6, 3))
    with pytest.raises(TypeError, match="damping must be a number, got str"):
        solver.scores(rows(1, 3), "auto")
    with pytest.raises(ValueError, match=r"queries must be \[M, 3\], got shape \(1, 4\)"):
        solver.scores(rows(1, 4), 1.0)
    with pytest.raises(ValueError, match="queries must be finite, got NaN or infinity in row 1"):
        solver.scores(torch.tensor([[0.0] * 3, [float("nan")] * 3]), 1.0)
    with pytest.raises(ValueError, match=r"features must be \[N, K\] with N, K >= 1"):
        RidgeSolver(torch.ones(3))
    with pytest.raises(ValueError, match=r"features must be \[N, K\] with N, K >= 1"):
        RidgeSolver(torch.ones(0, 3))
    with pytest.raises(ValueError, match="method must be one of primal, dual, svd, cg"):
        RidgeSolver(torch.ones(2, 3), method="lu")
    with pytest.raises(ValueError, match=r"targets must be \[6\] or \[6, C\]"):
        solver.leave_one_out_residuals(torch.ones(5), 1.0)
    with pytest.raises(ValueError, match="k must be from 1 to 6, got 7"):
        solver.top_k(rows(1, 3), 7, 1.0)
    with pytest.raises(ValueError, match="k must be from 1 to 2, got 0"):
        top_k(torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"scores must be \[M, N\], got shape \(3,\)"):
        top_k(torch.ones(3), 1)
    conjugate = RidgeSolver(rows(6, 3), method="cg")
    with pytest.raises(ValueError, match="damping must be positive for method 'cg'"):
        conjugate.scores(rows(1, 3), 0.0)
    for what, call in (
        ("leverages", lambda: conjugate.leverages(1.0)),
        ("preconditioned norms", lambda: conjugate.preconditioned_norms(1.0)),
        ("the rank", conjugate.rank),
    ):
        with pytest.raises(ValueError, match=f"{what} must come from a factorisation"):
            call()


def test_indefinite_gram_names_its_smallest_eigenvalue():
    gram = torch.diag(torch.tensor([3.0, -0.5, 1.0]))
    with pytest.raises(ValueError, match=r"smallest eigenvalue -4\.000e-01 at damping 0\.1"):
        cholesky(gram, 0.1)
    factor = cholesky(gram, 0.6)
    expected = gram.double() + 0.6 * torch.eye(3, dtype=torch.float64)
    assert relative_error(factor @ factor.T, expected) < 1e-12


def test_zero_features_score_zero():
    for method in METHODS:
        scores = RidgeSolver(torch.zeros(4, 6), method=method).scores(rows(2, 6), 1e-8)
        assert torch.equal(scores, torch.zeros(2, 4))


def test_plan_takes_the_smaller_gram_that_fits():
    assert plan_ridge(5000, 32768).method == "dual"
    assert plan_ridge(1_000_000, 4096).method == "primal"
    assert plan_ridge(1_000_000, 65536).method == "cg"
    assert plan_ridge(5000, 32768, memory_budget=2**28).method == "cg"
    # as many operations as the design counts: the dual about 1000x fewer than 27 inverses
    plan = plan_ridge(5000, 32768, num_dampings=27)
    inverses = 27 * 2.0 * 32768**3
    assert inverses / plan.flops["dual"] > 300
    assert plan.peak_bytes["dual"] <= plan.memory_budget
    assert RidgeSolver(rows(3, 9)).plan.method == RidgeSolver(rows(3, 9)).method == "dual"
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        plan_ridge(3, 0)


@pytest.mark.parametrize("call", ["scores", "iter_sweep", "top_k"])
def test_many_queries_fit_the_memory_budget(call):
    """Blocks of rows are small where there are far more queries than features."""
    from dtrak.runs.measure import TensorMeter

    features, queries, budget = rows(5000, 4), rows(400, 4, seed=1).double(), 2**18
    solver = RidgeSolver(features, method="primal", memory_budget=budget)
    solver.scores(queries[:1], 0.5)
    result = 0 if call == "top_k" else 400 * 5000 * 4
    with TensorMeter(known=[features, queries]) as meter:
        if call == "scores":
            found = solver.scores(queries, 0.5)
        elif call == "iter_sweep":
            found = next(solver.iter_sweep(queries, [0.5]))
        else:
            found = solver.top_k(queries, 1, 0.5).proponent_scores[:, 0]
    expected = by_singular_values(features, queries, 0.5)
    assert relative_error(found, expected.amax(1) if call == "top_k" else expected) < 1e-6
    assert meter.peak_bytes - result <= budget


def test_scores_of_16_bit_features_are_those_of_their_values():
    for dtype in (torch.float16, torch.bfloat16):
        features, queries = rows(12, 30).to(dtype), rows(3, 30, seed=1).to(dtype)
        expected = by_singular_values(features, queries, 0.5)
        assert relative_error(RidgeSolver(features).scores(queries, 0.5), expected) < 1e-6


def test_unused_dampings_cost_nothing():
    assert RidgeSolver(rows(4, 3)).scores_sweep(rows(2, 3), [1.0]).shape == (1, 2, 4)
    assert math.isfinite(float(RidgeSolver(rows(1, 1)).scores(rows(1, 1), 1.0)))
