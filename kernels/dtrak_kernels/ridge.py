"""The regularised inverse: scores ``Q (ΦᵀΦ + λI)⁻¹ Φᵀ`` from the smaller of two Gram matrices.

    primal   G = ΦᵀΦ [K, K]:   Q (G + λI)⁻¹ Φᵀ
    dual     D = ΦΦᵀ [N, N]:   QΦᵀ (D + λI)⁻¹            the push-through identity
    svd      QR, then the singular values of Φ itself: no squared condition number
    cg       conjugate gradients on G + λI, G never formed

Index legend: N training rows, K features, M queries, L dampings. Everything is factorised in
float64 (float32 loses every λ below about 1e-7 of the largest eigenvalue) and features are read
block by block, so they may be a tensor or anything on disk that answers ``features[i:j]``.

``damping`` is λ in units of ``gram = ΦᵀΦ``, a sum over rows and not a mean. Scores are ``[M, N]``;
positive means proponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from .gram import (
    NotConvergedError,
    Product,
    accumulate_gram,
    conjugate_gradient,
    gram_product,
    mirror_lower,
    nystrom_preconditioner,
)

METHODS = ("primal", "dual", "svd", "cg")

# a Gram form is trusted while λ + s_min >= _TRUST * s_max: its rounding, a few eps * s_max, then
# moves a score by less than 1e-6 of its size
_TRUST = 2.0**-26
_EPS = torch.finfo(torch.float64).eps
# bytes of float64 rows held at once while streaming
_BLOCK_BYTES = 32 * 2**20
_MEMORY_BUDGET = 8 * 2**30
# auto_damping looks between these multiples of the largest eigenvalue
_LOWEST, _HIGHEST = 1e-10, 10.0


class FeatureRows(Protocol):
    """What a store of features must answer: ``.shape`` and a slice of rows ``[j - i, K]``."""

    @property
    def shape(self) -> Sequence[int]:
        """``(N, K)``."""

    def __getitem__(self, rows: slice) -> Any:
        """Rows ``i:j`` as a tensor, or as an array ``torch.as_tensor`` accepts."""


@dataclass(frozen=True)
class Plan:
    """Which factorisation would be used, and what each would cost.

    Attributes:
        method: ``"primal"``, ``"dual"`` or ``"cg"``: the cheapest whose memory fits.
        flops: floating-point operations (a multiply-add is two) per method, leading terms.
        peak_bytes: bytes of working memory per method, beyond the features, queries and scores.
        memory_budget: the bytes the choice was held to.
    """

    method: str
    flops: dict[str, float]
    peak_bytes: dict[str, int]
    memory_budget: int


@dataclass(frozen=True)
class TopK:
    """The strongest training rows of each query.

    Attributes:
        proponents: ``[M, k]`` int64, row numbers in order of falling score.
        proponent_scores: ``[M, k]`` float32.
        opponents: ``[M, k]`` int64, row numbers in order of rising score.
        opponent_scores: ``[M, k]`` float32.
    """

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor


@dataclass(frozen=True)
class _Spectrum:
    """Squared singular values ``s [R]`` with left (dual) or right (primal) singular vectors.

    ``floor`` is the largest computed value that rounding could have made of an exact zero;
    ``is_exact`` says that Φ itself was decomposed, so that what lies above it is real.
    """

    s: Tensor
    basis: Tensor
    floor: float
    is_exact: bool

    @property
    def largest(self) -> float:
        return float(self.s.max()) if self.s.numel() else 0.0

    @property
    def smallest(self) -> float:
        return float(self.s.min()) if self.s.numel() else 0.0

    def inverse(self, damping: float) -> Tensor:
        """``1 / (s + λ)``, and 0 for what is numerically an exact zero of Φ.

        A direction no feature row has contributes nothing to a score, but its rounding error
        divided by a small λ would.
        """
        inverse = 1.0 / (self.s + damping)
        return torch.where(self.s <= self.floor, 0.0, inverse) if self.is_exact else inverse


def plan_ridge(
    num_samples: int,
    num_features: int,
    *,
    num_queries: int = 1000,
    num_dampings: int = 1,
    memory_budget: int = _MEMORY_BUDGET,
) -> Plan:
    """The factorisation a :class:`RidgeSolver` would choose for ``[N, K]`` features, and its cost.

    One damping is solved by Cholesky, several by one eigendecomposition. The cost of ``"cg"``
    assumes 100 iterations for each damping.

    Args:
        num_samples: ``N``, at least 1.
        num_features: ``K``, at least 1.
        num_queries: ``M``, for the cost of applying the inverse.
        num_dampings: ``L``, at least 1.
        memory_budget: bytes of working memory the choice may use.

    Raises:
        ValueError: a size below 1.
    """
    sizes = {
        "num_samples": num_samples,
        "num_features": num_features,
        "num_queries": num_queries,
        "num_dampings": num_dampings,
        "memory_budget": memory_budget,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    N, K, M, L = num_samples, num_features, num_queries, num_dampings

    def factorise(n: int) -> float:
        # Cholesky n³/3; symmetric eigendecomposition with vectors about 9 n³
        return n**3 / 3 if L == 1 else 9.0 * n**3

    flops = {
        "primal": float(N) * K * K + factorise(K) + L * (4.0 * M * K * K + 2.0 * M * N * K),
        "dual": float(K) * N * N + factorise(N) + 2.0 * M * N * K + L * 4.0 * M * N * N,
        "cg": L * (100 * 4.0 + 2.0) * M * N * K,
    }
    # one block as read, as a mask and in float64, and what is made of it before it is cut down
    block = min(6 * _BLOCK_BYTES, 48 * N * max(K, M))
    peak_bytes = {
        # the Gram, its factor and the library's workspace; queries in float64, before and after
        "primal": 4 * 8 * K * K + block + 16 * M * K,
        "dual": 4 * 8 * N * N + block + min(memory_budget // 4, 8 * N * K + 24 * M * N),
        # CG holds six vectors per right-hand side and the preconditioner's three
        "cg": 8 * K * (6 * min(M, _cg_columns(K)) + 3 * _cg_rank(N, K)) + block + 16 * M * K,
    }
    fitting = [m for m in ("dual", "primal") if peak_bytes[m] <= memory_budget]
    # both orders of the product give the same scores: the smaller matrix wins, dual on a tie
    method = min(fitting, key=lambda m: flops[m]) if fitting else "cg"
    return Plan(method, flops, peak_bytes, memory_budget)


def cholesky(gram: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of ``gram + λI`` in float64.

    Args:
        gram: ``[K, K]`` floating, symmetric; only the lower triangle is read.
        damping: λ >= 0 in units of ``gram``.

    Raises:
        ValueError: ``gram + λI`` is not positive definite; the message names its smallest
            eigenvalue.
    """
    damped = mirror_lower(gram.to(torch.float64, copy=True))
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        smallest = float(torch.linalg.eigvalsh(damped)[0])
        raise ValueError(
            f"gram + damping must be positive definite, got smallest eigenvalue {smallest:.3e} "
            f"at damping {damping:g}"
        )
    return factor


class RidgeSolver:
    """Scores, leverages and leave-one-out quantities of ridge regression on ``features``.

    Nothing is computed until asked for; factorisations are kept and shared by every later call.
    One damping costs a Cholesky factorisation, several cost one eigendecomposition between them.
    Where λ is so small that the Gram's rounding would show (λ + s_min < 2**-26 s_max), the features
    themselves are factorised (QR, then singular values), so every λ > 0 is answered to about 1e-6.

    Args:
        features: ``[N, K]`` floating tensor, or a store with ``.shape`` and ``store[i:j]``. Its
            device is where the work is done. Rows are read anew whenever they are needed, so they
            must not change.
        method: ``"primal"``, ``"dual"``, ``"svd"``, ``"cg"``, or ``None`` to choose by cost within
            ``memory_budget`` (see :func:`plan_ridge`).
        memory_budget: bytes of working memory, beyond features, queries and scores.
        tolerance: of conjugate gradients: largest relative residual of any query.
        max_iterations: of conjugate gradients, for each precision it works in.
        implementation: of the Gram-vector product in conjugate gradients, as in
            :func:`gram_product`. Where that is the float32 kernel, its solutions are refined
            against float64 residuals, so the tolerance means the same.

    Raises:
        ValueError: ``features`` is not ``[N, K]`` with N, K >= 1, or ``method`` is unknown.

    Source:
        TRAK, Park et al. 2023 (arXiv:2303.14186) for the score; the dual form is the push-through
        identity ``(ΦᵀΦ + λI)⁻¹Φᵀ = Φᵀ(ΦΦᵀ + λI)⁻¹``.
    """

    def __init__(
        self,
        features: Tensor | FeatureRows,
        *,
        method: str | None = None,
        memory_budget: int = _MEMORY_BUDGET,
        tolerance: float = 1e-9,
        max_iterations: int = 1000,
        implementation: str | None = None,
    ) -> None:
        shape = tuple(features.shape)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"features must be [N, K] with N, K >= 1, got shape {shape}")
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
        self.features = features
        self.num_samples, self.num_features = int(shape[0]), int(shape[1])
        self.memory_budget = memory_budget
        self.plan = plan_ridge(self.num_samples, self.num_features, memory_budget=memory_budget)
        self.method = self.plan.method if method is None else method
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.implementation = implementation
        self._gram: Tensor | None = None
        self._eigen: _Spectrum | None = None
        self._svd: _Spectrum | None = None

    @property
    def _is_dual(self) -> bool:
        if self.method == "svd":
            return self.num_samples <= self.num_features
        return self.method == "dual"

    def _rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` as float64, refused if any is not finite."""
        block = torch.as_tensor(self.features[start:stop])
        finite = torch.isfinite(block).all(dim=1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"features must be finite, got NaN or infinity in row {row}")
        return block.to(torch.float64)

    def _block_rows(self, width: int = 1) -> int:
        width = max(width, self.num_features)
        return max(1, min(_BLOCK_BYTES, self.memory_budget // 8) // (8 * width))

    def _blocks(self, width: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, rows [B, K] float64)`` over all rows, each read once.

        ``width`` is how many values per row the caller makes of them, if more than K.
        """
        size = self._block_rows(width)
        for start in range(0, self.num_samples, size):
            stop = min(start + size, self.num_samples)
            yield start, stop, self._rows(start, stop)

    def _checked_queries(self, queries: Tensor) -> Tensor:
        if queries.ndim != 2 or queries.shape[1] != self.num_features:
            raise ValueError(
                f"queries must be [M, {self.num_features}], got shape {tuple(queries.shape)}"
            )
        finite = torch.isfinite(queries).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"queries must be finite, got NaN or infinity in row {row}")
        return queries.to(torch.float64)

    def _gram_matrix(self) -> Tensor:
        """``ΦᵀΦ [K, K]`` or ``ΦΦᵀ [N, N]`` in float64, both triangles."""
        if self._gram is not None:
            return self._gram
        if not self._is_dual:
            gram: Tensor | None = None
            for _, _, rows in self._blocks():
                if gram is None:
                    gram = rows.new_zeros(self.num_features, self.num_features)
                accumulate_gram(rows, gram)
            assert gram is not None
            self._gram = mirror_lower(gram)
            return self._gram
        # wide, because every earlier row is read again for each of these blocks
        wide = max(1, self.memory_budget // 8 // (8 * self.num_features))
        narrow = self._block_rows()
        gram = None
        for start in range(0, self.num_samples, wide):
            stop = min(start + wide, self.num_samples)
            left = self._rows(start, stop)
            if gram is None:
                gram = left.new_zeros(self.num_samples, self.num_samples)
            accumulate_gram(left.T, gram[start:stop, start:stop])
            for other in range(0, start, narrow):
                end = min(other + narrow, start)
                gram[start:stop, other:end] = left @ self._rows(other, end).T
        assert gram is not None
        self._gram = mirror_lower(gram)
        return self._gram

    def _eigendecomposition(self) -> _Spectrum:
        if self._eigen is None:
            gram = self._gram_matrix()
            s, basis = torch.linalg.eigh(gram)
            floor = max(self.num_samples, self.num_features) * _EPS * float(s.max().clamp(min=0.0))
            self._eigen = _Spectrum(s.clamp_(min=0.0), basis, floor, is_exact=False)
        return self._eigen

    def _singular_values(self) -> _Spectrum:
        """The spectrum from Φ itself: error eps * σ_max in σ, where a Gram has eps * σ_max**2."""
        if self._svd is not None:
            return self._svd
        triangle: Tensor | None = None
        for piece in self._columns() if self._is_dual else (rows for _, _, rows in self._blocks()):
            stacked = piece if triangle is None else torch.cat([triangle, piece])
            triangle = torch.linalg.qr(stacked, mode="r").R
        assert triangle is not None
        # the piece is Φᵀ (dual) or Φ (primal): either way its right singular vectors are wanted
        _, sigma, right = torch.linalg.svd(triangle, full_matrices=True)
        size = right.shape[0]
        s = right.new_zeros(size)
        s[: sigma.numel()] = sigma**2
        zero = max(self.num_samples, self.num_features) * _EPS
        floor = (zero * float(sigma[0])) ** 2
        self._svd = _Spectrum(s, right.T.contiguous(), floor, is_exact=True)
        return self._svd

    def _columns(self) -> Iterator[Tensor]:
        """``[C, N]`` float64 blocks of Φᵀ; a store is read once per block of columns."""
        width = max(1, min(self.num_features, self.memory_budget // 4 // (8 * self.num_samples)))
        for start in range(0, self.num_features, width):
            stop = min(start + width, self.num_features)
            yield torch.cat([rows[:, start:stop] for _, _, rows in self._blocks()]).T

    def _spectrum_for(self, damping: float) -> _Spectrum:
        """A spectrum whose inverse at λ is right to about 1e-6."""
        if self.method != "svd":
            eigen = self._eigendecomposition()
            if damping + eigen.smallest >= _TRUST * eigen.largest:
                return eigen
        return self._singular_values()

    def _check_damping(self, damping: float) -> float:
        if not isinstance(damping, Real):
            raise TypeError(f"damping must be a number, got {type(damping).__name__}")
        damping = float(damping)
        if not (math.isfinite(damping) and damping >= 0.0):
            raise ValueError(f"damping must be finite and at least 0, got {damping}")
        if damping == 0.0:
            if self.method == "cg":
                raise ValueError("damping must be positive for method 'cg', got 0.0")
            rank = self.rank()
            if rank < self.num_features:
                raise ValueError(
                    f"damping must be positive: the Gram is singular, rank {rank} "
                    f"of {self.num_features}"
                )
        return damping

    def rank(self) -> int:
        """Numerical rank of ``features``: singular values above ``max(N, K) * eps * σ_max``."""
        self._refuse_cg("the rank")
        spectrum = self._spectrum_for(0.0)
        return int((spectrum.s > spectrum.floor).sum())

    def _refuse_cg(self, what: str) -> None:
        if self.method == "cg":
            raise ValueError(f"{what} must come from a factorisation, got method 'cg'")

    def scores(self, queries: Tensor, damping: float, *, out: Tensor | None = None) -> Tensor:
        """``queries (ΦᵀΦ + λI)⁻¹ Φᵀ``, computed in float64.

        Args:
            queries: ``[M, K]`` floating, on the features' device.
            damping: λ in units of ``gram``, finite; 0 only where the Gram has full rank.
            out: ``[M, N]`` float32 to write to (a memory-mapped file will do), or ``None``.

        Returns:
            ``[M, N]`` float32, positive = proponent.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: queries of the wrong width, a non-finite row (named) of either matrix, a
                negative or non-finite damping, λ = 0 on a singular Gram (the rank is named),
                ``out`` of the wrong shape or dtype, or conjugate gradients that did not converge
                (the residual is named).
        """
        queries = self._checked_queries(queries)
        damping = self._check_damping(damping)
        shape = (queries.shape[0], self.num_samples)
        if out is None:
            out = queries.new_empty(shape, dtype=torch.float32)
        elif tuple(out.shape) != shape or out.dtype != torch.float32:
            raise ValueError(
                f"out must be {list(shape)} float32, got {list(out.shape)} {out.dtype}"
            )
        if self._is_dual:
            for start, stop, scores in self._dual_scores(queries, damping):
                out[start:stop] = scores
        else:
            preconditioned = self._precondition(queries, damping)
            for start, stop, rows in self._blocks(width=queries.shape[0]):
                out[:, start:stop] = preconditioned @ rows.T
        return out

    def top_k(self, queries: Tensor, k: int, damping: float) -> TopK:
        """The ``k`` largest and ``k`` smallest scores of each query, without the ``[M, N]`` matrix.

        Memory beyond the factorisation is that of one block of rows or queries, and ``M (K + k)``
        where the Gram is primal or never formed.

        Args:
            queries: ``[M, K]`` floating.
            k: from 1 to N.
            damping: λ in units of ``gram``.

        Returns:
            Row numbers and scores; of equal scores the lower row number comes first.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: ``k`` is out of range, or as for :meth:`scores`.
        """
        queries = self._checked_queries(queries)
        damping = self._check_damping(damping)
        _check_k(k, self.num_samples)
        if self._is_dual:
            parts = [top_k(scores, k) for _, _, scores in self._dual_scores(queries, damping)]
            return TopK(
                torch.cat([part.proponents for part in parts]),
                torch.cat([part.proponent_scores for part in parts]),
                torch.cat([part.opponents for part in parts]),
                torch.cat([part.opponent_scores for part in parts]),
            )
        preconditioned = self._precondition(queries, damping)
        best: list[tuple[Tensor, Tensor]] = []
        for start, stop, rows in self._blocks(width=queries.shape[0]):
            scores = (preconditioned @ rows.T).float()
            numbers = torch.arange(start, stop, device=scores.device).expand(scores.shape)
            found = [
                _keep(scores, numbers, k, descending=descending) for descending in (True, False)
            ]
            if best:
                # earlier rows first, so that of equal scores they stay first
                merged = [
                    (torch.cat([old[0], new[0]], dim=1), torch.cat([old[1], new[1]], dim=1))
                    for old, new in zip(best, found, strict=True)
                ]
                found = [
                    _keep(*pair, k, descending=descending)
                    for pair, descending in zip(merged, (True, False), strict=True)
                ]
            best = found
        (high, proponents), (low, opponents) = best
        return TopK(proponents, high, opponents, low)

    def scores_sweep(self, queries: Tensor, dampings: Sequence[float]) -> Tensor:
        """:meth:`scores` for several dampings, for the price of one eigendecomposition.

        Args:
            queries: ``[M, K]`` floating.
            dampings: L values of λ in units of ``gram``.

        Returns:
            ``[L, M, N]`` float32. :meth:`iter_sweep` yields them one by one instead.

        Raises:
            ValueError: as for :meth:`scores`.
        """
        return torch.stack(list(self.iter_sweep(queries, dampings)))

    def iter_sweep(self, queries: Tensor, dampings: Sequence[float]) -> Iterator[Tensor]:
        """The ``[M, N]`` float32 scores of each damping in turn, one held at a time."""
        queries = self._checked_queries(queries)
        checked = [self._check_damping(damping) for damping in dampings]
        return self._sweep(queries, checked)

    def _sweep(self, queries: Tensor, dampings: Sequence[float]) -> Iterator[Tensor]:
        if self.method == "cg":
            for damping in dampings:
                yield self._times_rows(self._solve_cg(queries, damping))
            return
        # one entry per spectrum in use, which this solver keeps alive: the Gram's, perhaps Φ's own
        rotated: dict[int, Tensor] = {}
        left = self._cross(queries) if self._is_dual else queries
        for damping in dampings:
            spectrum = self._spectrum_for(damping)
            if id(spectrum) not in rotated:
                rotated[id(spectrum)] = left @ spectrum.basis
            product = (rotated[id(spectrum)] * spectrum.inverse(damping)) @ spectrum.basis.T
            yield product.float() if self._is_dual else self._times_rows(product)

    def preconditioned(self, damping: float) -> Tensor:
        """``Φ (ΦᵀΦ + λI)⁻¹``: what a query is multiplied with to give its scores.

        Returns:
            ``[N, K]`` float32, computed in float64.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: as for :meth:`scores`.
        """
        damping = self._check_damping(damping)
        if not self._is_dual:
            blocks = [self._precondition(rows, damping).float() for _, _, rows in self._blocks()]
            return torch.cat(blocks)
        factor = self._cholesky_for(damping)
        blocks = []
        for columns in self._columns():
            if factor is not None:
                blocks.append(torch.cholesky_solve(columns.T, factor).float())
            else:
                spectrum = self._spectrum_for(damping)
                weighted = (columns @ spectrum.basis) * spectrum.inverse(damping)
                blocks.append((spectrum.basis @ weighted.T).float())
        return torch.cat(blocks, dim=1)

    def inverse_times(self, queries: Tensor, damping: float) -> Tensor:
        """``Q (ΦᵀΦ + λI)⁻¹``.

        From the dual it is ``(Q - QΦᵀ(ΦΦᵀ + λI)⁻¹Φ) / λ``, whose error grows as 1 / λ: for scores
        use :meth:`scores`, which does not pass through it.

        Args:
            queries: ``[M, K]`` floating.
            damping: λ in units of ``gram``.

        Returns:
            ``[M, K]`` float64.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: as for :meth:`scores`.
        """
        queries = self._checked_queries(queries)
        damping = self._check_damping(damping)
        if not self._is_dual or damping == 0.0:
            return self._precondition(queries, damping)
        spectrum = self._spectrum_for(damping)
        inner = (self._cross(queries) @ spectrum.basis) * spectrum.inverse(damping)
        inner = inner @ spectrum.basis.T
        explained = torch.zeros_like(queries)
        for start, stop, rows in self._blocks():
            explained += inner[:, start:stop] @ rows
        return (queries - explained) / damping

    def _dual_scores(self, queries: Tensor, damping: float) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, scores [stop - start, N] float32)`` for blocks of queries."""
        factor = self._cholesky_for(damping)
        size = max(1, self.memory_budget // 8 // (24 * self.num_samples))
        for start in range(0, queries.shape[0], size):
            part = queries[start : start + size]
            if factor is None:
                scores = next(self._sweep(part, [damping]))
            else:
                scores = torch.cholesky_solve(self._cross(part).T, factor).T.float()
            yield start, start + part.shape[0], scores

    def _precondition(self, queries: Tensor, damping: float) -> Tensor:
        """``Q (G + λI)⁻¹ [M, K]`` float64; not for the dual."""
        if self.method == "cg":
            return self._solve_cg(queries, damping)
        factor = self._cholesky_for(damping)
        if factor is not None:
            return torch.cholesky_solve(queries.T, factor).T
        spectrum = self._spectrum_for(damping)
        return ((queries @ spectrum.basis) * spectrum.inverse(damping)) @ spectrum.basis.T

    def _cholesky_for(self, damping: float) -> Tensor | None:
        """The factor of the Gram at λ; ``None`` where eigenvalues are at hand or are needed."""
        if self.method == "svd" or self._eigen is not None:
            return None
        gram = self._gram_matrix()
        # the Frobenius norm bounds s_max from above
        if damping == 0.0 or damping < _TRUST * float(torch.linalg.norm(gram)):
            return None
        return cholesky(gram, damping)

    def _cross(self, queries: Tensor) -> Tensor:
        """``QΦᵀ [M, N]`` float64."""
        cross = queries.new_empty(queries.shape[0], self.num_samples)
        for start, stop, rows in self._blocks():
            cross[:, start:stop] = queries @ rows.T
        return cross

    def _times_rows(self, preconditioned: Tensor) -> Tensor:
        """``[M, K] float64 -> [M, N] float32``, the product with Φᵀ."""
        shape = (preconditioned.shape[0], self.num_samples)
        scores = preconditioned.new_empty(shape, dtype=torch.float32)
        for start, stop, rows in self._blocks():
            scores[:, start:stop] = preconditioned @ rows.T
        return scores

    def _solve_cg(self, queries: Tensor, damping: float) -> Tensor:
        """``Q (G + λI)⁻¹ [M, K]`` float64."""
        for _ in self._blocks():
            # a first reading, for the sake of the finite check alone
            pass
        precondition = nystrom_preconditioner(
            self.features,
            damping,
            rank=_cg_rank(self.num_samples, self.num_features),
            device=queries.device,
        )
        columns = _cg_columns(self.num_features)
        solved = queries.new_empty(queries.shape)
        for start in range(0, queries.shape[0], columns):
            part = queries[start : start + columns].T.contiguous()
            solved[start : start + columns] = self._solve_columns(part, damping, precondition).T
        return solved

    def _solve_columns(self, right: Tensor, damping: float, precondition: Product) -> Tensor:
        """``(G + λI)⁻¹ right`` for ``right [K, B]`` float64."""

        def exact(vectors: Tensor) -> Tensor:
            return gram_product(self.features, vectors, damping, implementation="torch")

        def fast(vectors: Tensor) -> Tensor:
            return gram_product(self.features, vectors, damping, implementation=self.implementation)

        def fast_precondition(vectors: Tensor) -> Tensor:
            return precondition(vectors.double()).float()

        scale = torch.linalg.norm(right, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        right = right / scale
        x, residual = torch.zeros_like(right), right
        on_gpu = isinstance(self.features, Tensor) and self.features.is_cuda
        refine = self.implementation == "triton" or (self.implementation is None and on_gpu)
        worst = 1.0
        while refine and worst > self.tolerance:
            size = torch.linalg.norm(residual, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
            try:
                step = conjugate_gradient(
                    fast,
                    (residual / size).float(),
                    tolerance=1e-3,
                    max_iterations=self.max_iterations,
                    preconditioner=fast_precondition,
                )
            except NotConvergedError:
                break
            candidate = x + step.double() * size
            candidate_residual = right - exact(candidate)
            reached = float(torch.linalg.norm(candidate_residual, dim=0).max())
            # float32 has given what it can at this conditioning: float64 does the rest
            refine = reached < 0.5 * worst
            if reached < worst:
                x, residual, worst = candidate, candidate_residual, reached
        if worst > self.tolerance:
            size = torch.linalg.norm(residual, dim=0).clamp(min=self.tolerance)
            x = x + size * conjugate_gradient(
                exact,
                residual / size,
                tolerance=self.tolerance / float(size.max()),
                max_iterations=self.max_iterations,
                preconditioner=precondition,
            )
        return x * scale

    def leverages(self, damping: float) -> Tensor:
        """The diagonal of ``Φ (ΦᵀΦ + λI)⁻¹ Φᵀ``: each training row's score on itself.

        Returns:
            ``[N]`` float64 in [0, 1).

        Raises:
            ValueError: a damping :meth:`scores` refuses, or method ``"cg"``.
        """
        self._refuse_cg("leverages")
        damping = self._check_damping(damping)
        spectrum = self._spectrum_for(damping)
        return self._leverages(spectrum, spectrum.inverse(damping)[:, None])[:, 0]

    def _leverages(self, spectrum: _Spectrum, inverse: Tensor) -> Tensor:
        """``[N, L]`` leverages for ``inverse [R, L]``, one pass over the rows."""
        if self._is_dual:
            return spectrum.basis**2 @ (spectrum.s[:, None] * inverse)
        leverages = inverse.new_empty(self.num_samples, inverse.shape[1])
        for start, stop, rows in self._blocks():
            leverages[start:stop] = (rows @ spectrum.basis) ** 2 @ inverse
        return leverages

    def leave_one_out_residuals(self, targets: Tensor, damping: float) -> Tensor:
        """``y_i`` minus its prediction by ridge regression on every row but ``i``, exactly.

        Args:
            targets: ``[N]`` or ``[N, C]`` floating, regressed on ``features`` without intercept.
            damping: λ in units of ``gram``, the same for every fold.

        Returns:
            float64, shaped as ``targets``.

        Raises:
            ValueError: ``targets`` is not ``[N]`` or ``[N, C]``, or as for :meth:`leverages`.

        Source:
            Allen 1974 (PRESS); the identity ``(y − Hy) / (1 − h)`` holds for ridge regression
            without intercept.
        """
        self._check_targets(targets)
        leverages = self.leverages(damping)
        y = targets.to(torch.float64).reshape(self.num_samples, -1)
        spectrum = self._spectrum_for(damping)
        if self._is_dual:
            weight = (spectrum.s * spectrum.inverse(damping))[:, None]
            fitted = spectrum.basis @ (weight * (spectrum.basis.T @ y))
        else:
            moment = sum(rows.T @ y[start:stop] for start, stop, rows in self._blocks())
            weight = spectrum.inverse(damping)[:, None]
            coefficients = spectrum.basis @ (weight * (spectrum.basis.T @ moment))
            fitted = torch.cat([rows @ coefficients for _, _, rows in self._blocks()])
        return ((y - fitted) / (1.0 - leverages)[:, None]).reshape(targets.shape)

    def feature_norms(self) -> Tensor:
        """``‖φ_i‖₂`` of every training row, ``[N]`` float64."""
        return torch.cat([torch.linalg.norm(rows, dim=1) for _, _, rows in self._blocks()])

    def preconditioned_norms(self, damping: float) -> Tensor:
        """``‖(ΦᵀΦ + λI)⁻¹ φ_i‖₂`` of every training row, ``[N]`` float64.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: a damping :meth:`scores` refuses, or method ``"cg"``.
        """
        self._refuse_cg("preconditioned norms")
        damping = self._check_damping(damping)
        spectrum = self._spectrum_for(damping)
        return self._leverages(spectrum, spectrum.inverse(damping)[:, None] ** 2)[:, 0].sqrt()

    def auto_damping(self, targets: Tensor | None = None) -> float:
        r"""A damping from the training features alone, by leave-one-out; no query is looked at.

        Without ``targets``: the λ under which each held-out feature row is likeliest given the
        others, the minimum over λ of

        .. math:: \sum_{j \le r} \log(s_j + \lambda) + \frac1N \sum_i
            \Big[ \log(1 - m_i h_i) + (N - m_i) \frac{h_i}{1 - m_i h_i} \Big]

        which is minus twice the log density, up to constants, of row i under the normal
        distribution on the r-dimensional span of the rows whose covariance is the damped second
        moment of the rest, ``(G - m_i φ_i φ_iᵀ + λI) / (N - m_i)``. ``s`` are the eigenvalues of
        the Gram, ``h`` the leverages, and ``m_i`` is how many rows equal row i bit for bit: copies
        are left out together, or a row would be predicted by itself. Zero rows are not counted.

        Why not a regression target: with the scores' own, the constant 1 (the sum over training
        rows of a query's scores *is* the ridge prediction of 1), the optimum is infinite where
        gradients average to zero, as they do for a trained loss; with the kernel rows themselves as
        targets there is no noise, and it is 0. The density always has its optimum inside: it falls
        without bound for λ → 0 where rows are independent and for λ → ∞ always, and its derivative
        at 0 is positive where N > K. It depends on Φ only through ΦΦᵀ, so zero columns and
        rotations do not matter; it scales by c² when the features do, and doubles when every row is
        doubled. It measures the noise of the features, not of the model's training, so it is a
        cautious choice: where held-out *subset models* are at hand, prefer a λ chosen on half of
        them.

        With ``targets``: generalised cross-validation of the ridge regression of ``targets`` on the
        features, without intercept: the minimum of ``N ‖(I - H) y‖² / tr(I - H)²``. Per-sample
        training outputs less their mean are a sensible target.

        Args:
            targets: ``[N]`` or ``[N, C]`` floating, or ``None``.

        Returns:
            λ in units of ``gram``, within [1e-10, 10] times the Gram's largest eigenvalue.

        Raises:
            ValueError: method ``"cg"``, features that are all zero, ``targets`` of the wrong shape,
                or ``targets`` whose criterion has no minimum inside that range.

        Source:
            Density: leave-one-out likelihood for a regularised covariance, Hoffbeck and Landgrebe
            1996 (IEEE PAMI 18, 763). Targets: Golub, Heath and Wahba 1979 (Technometrics 21, 215).
        """
        self._refuse_cg("auto_damping")
        spectrum = self._eigendecomposition()
        if spectrum.largest == 0.0:
            raise ValueError("features must have a non-zero row to choose a damping, got none")
        low, high = _LOWEST * spectrum.largest, _HIGHEST * spectrum.largest
        if targets is None:
            copies, is_zero = self._duplicates()
        else:
            self._check_targets(targets)
        for points in (67, 33, 33):
            exponents = torch.linspace(
                math.log(low), math.log(high), points, dtype=torch.float64, device=spectrum.s.device
            )
            grid = exponents.exp()
            if targets is None:
                criterion = self._held_out_density(spectrum, grid, copies, is_zero)
            else:
                criterion = self._cross_validation(spectrum, grid, targets)
            best = int(criterion.argmin())
            if targets is not None and points == 67 and best in (0, points - 1):
                raise ValueError(
                    "targets must have a cross-validation minimum at a damping between "
                    f"{low:.3g} and {high:.3g}, got it at the end {float(grid[best]):.3g}"
                )
            low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
        return float(grid[best])

    def _held_out_density(
        self, spectrum: _Spectrum, grid: Tensor, copies: Tensor, is_zero: Tensor
    ) -> Tensor:
        """The criterion of :meth:`auto_damping` without targets at each damping of ``grid [L]``."""
        inverse = 1.0 / (spectrum.s[:, None] + grid)
        leverages = self._leverages(spectrum, inverse)[~is_zero]
        m = copies[~is_zero][:, None]
        left_out = (1.0 - m * leverages).clamp(min=_EPS)
        misfit = torch.log(left_out) + (len(leverages) - m) * leverages / left_out
        span = spectrum.s[spectrum.s > spectrum.floor]
        return torch.log(span[:, None] + grid).sum(dim=0) + misfit.mean(dim=0)

    def _cross_validation(self, spectrum: _Spectrum, grid: Tensor, targets: Tensor) -> Tensor:
        """The criterion of :meth:`auto_damping` with targets at each damping of ``grid [L]``."""
        y = targets.to(torch.float64).reshape(self.num_samples, -1)
        shrink = grid / (spectrum.s[:, None] + grid)
        # numerically zero values belong to no direction of the features
        is_span = spectrum.s > spectrum.floor
        if self._is_dual:
            along = spectrum.basis.T @ y
        else:
            moment = torch.zeros_like(spectrum.basis[:, :1]).expand(-1, y.shape[1]).clone()
            for start, stop, rows in self._blocks():
                moment += rows.T @ y[start:stop]
            sigma = torch.where(is_span, spectrum.s, 1.0).sqrt()
            along = (spectrum.basis.T @ moment) / sigma[:, None]
        energy = torch.where(is_span, (along**2).sum(dim=1), 0.0)
        outside = ((y**2).sum() - energy.sum()).clamp(min=0.0)
        residual = outside + energy @ shrink**2
        fitted = (1.0 - shrink)[is_span].sum(dim=0)
        return self.num_samples * residual / (self.num_samples - fitted) ** 2

    def _check_targets(self, targets: Tensor) -> None:
        if targets.ndim not in (1, 2) or targets.shape[0] != self.num_samples:
            raise ValueError(
                f"targets must be [{self.num_samples}] or [{self.num_samples}, C], "
                f"got shape {tuple(targets.shape)}"
            )

    def _duplicates(self) -> tuple[Tensor, Tensor]:
        """How many rows equal each row bit for bit ``[N] float64``, and which are zero ``[N]``."""
        keys, zeros = [], []
        for _, _, rows in self._blocks():
            # adding 0.0 makes one zero of the two
            words = (rows + 0.0).view(torch.int64)
            # an odd multiplier for each column; int64 wraps, so the order of the sum is immaterial
            columns = torch.arange(self.num_features, device=rows.device, dtype=torch.int64)
            mixed = (words ^ (words >> 29)) * (columns * -7046029254386353131 * 2 + 1)
            keys.append((mixed ^ (mixed >> 32)).sum(dim=1))
            zeros.append((rows == 0).all(dim=1))
        _, group, counts = torch.unique(torch.cat(keys), return_inverse=True, return_counts=True)
        return counts[group].to(torch.float64), torch.cat(zeros)


def top_k(scores: Tensor, k: int) -> TopK:
    """The ``k`` largest and ``k`` smallest scores of each query.

    Args:
        scores: ``[M, N]`` floating, positive = proponent.
        k: from 1 to N.

    Returns:
        Row numbers and scores; of equal scores the lower row number comes first.

    Raises:
        ValueError: ``scores`` is not ``[M, N]``, or ``k`` is out of range.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [M, N], got shape {tuple(scores.shape)}")
    _check_k(k, scores.shape[1])
    numbers = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    high, proponents = _keep(scores, numbers, k, descending=True)
    low, opponents = _keep(scores, numbers, k, descending=False)
    return TopK(proponents, high, opponents, low)


def _keep(values: Tensor, indices: Tensor, k: int, *, descending: bool) -> tuple[Tensor, Tensor]:
    """The first ``k`` columns in order of value; stable, so ties keep the order they come in."""
    if values.shape[1] > 8 * k:
        chosen, order = torch.topk(values, k, dim=1, largest=descending)
        last = chosen[:, -1:]
        beyond = values >= last if descending else values <= last
        # the library picks any of several equal values: sort everything where a tie is cut
        if int(beyond.sum()) == chosen.numel():
            order = order.sort(dim=1).values
            values, indices = values.gather(1, order), indices.gather(1, order)
    ordered, order = torch.sort(values, dim=1, descending=descending, stable=True)
    return ordered[:, :k].contiguous(), indices.gather(1, order[:, :k])


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to {num_samples}, got {k}")


def _cg_columns(num_features: int) -> int:
    """Right-hand sides solved together: 64 MiB of float64 per vector block, at most 256."""
    return max(1, min(256, 64 * 2**20 // (8 * num_features)))


def _cg_rank(num_samples: int, num_features: int) -> int:
    """Rank of the preconditioner: a sketch costs as much as one product with as many vectors."""
    return max(1, min(num_samples, num_features, 128))
