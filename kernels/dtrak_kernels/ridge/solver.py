"""The regularised inverse: scores ``Q (ΦᵀΦ + λI)⁻¹ Φᵀ`` from the smaller of two Gram matrices.

    primal   G = ΦᵀΦ [K, K]:   Q (G + λI)⁻¹ Φᵀ
    dual     D = ΦΦᵀ [N, N]:   QΦᵀ (D + λI)⁻¹            the push-through identity
    svd      QR, then the singular values of Φ itself: no squared condition number
    cg       conjugate gradients on G + λI, G never formed

Index legend: N training rows, n of them in this process (all, where it is alone), K features, M
queries, L dampings. Everything is factorised in float64 (float32 loses every λ below about 1e-7 of
the largest eigenvalue) and features are read block by block, so they may be a tensor or anything on
disk that answers ``features[i:j]``.

Several processes may have a part of the rows each. G is then summed over them, D is made by blocks
of rows, conjugate gradients sum their products, and whatever has a row or column for each training
row is of the n rows of this process: only top-k and the factorisation are the same in all.

``damping`` is λ in units of ``gram = ΦᵀΦ``, a sum over rows and not a mean. Scores are ``[M, n]``;
positive means proponent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .factors import Factors
from .gram import Product
from .group import Group
from .held_out import check_targets, choose_damping, fitted_values, leverages
from .iteration import iterative_inverse
from .plan import MEMORY_BUDGET, METHODS, plan_ridge
from .ranking import TopK, check_k, join_queries, join_rows, rank_blocks, top_k
from .rows import FeatureRows, RowReader, check_finite


class RidgeSolver:
    """Scores, leverages and leave-one-out quantities of ridge regression on ``features``.

    Nothing is computed until asked for; factorisations are kept and shared by every later call.
    One damping costs a Cholesky factorisation, several cost one eigendecomposition between them.
    Where λ is so small that the Gram's rounding would show (λ + s_min < 2**-26 s_max), the features
    themselves are factorised (QR, then singular values), so every λ > 0 is answered to about 1e-6.

    Args:
        features: ``[n, K]`` floating tensor, or a store with ``.shape`` and ``store[i:j]``. Its
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
        group: process group of `torch.distributed` whose processes have a part of the rows each,
            in order of their ranks; ``None`` for all rows here. Every process makes the same calls
            in the same order, with the same queries and dampings. The working memory of each is
            that of :func:`plan_ridge`, for all N rows.

    Raises:
        ValueError: ``features`` is not ``[n, K]`` with N, K >= 1, or ``method`` is unknown.

    Source:
        TRAK, Park et al. 2023 (arXiv:2303.14186) for the score; the dual form is the push-through
        identity ``(ΦᵀΦ + λI)⁻¹Φᵀ = Φᵀ(ΦΦᵀ + λI)⁻¹``.
    """

    def __init__(
        self,
        features: Tensor | FeatureRows,
        *,
        method: str | None = None,
        memory_budget: int = MEMORY_BUDGET,
        tolerance: float = 1e-9,
        max_iterations: int = 1000,
        implementation: str | None = None,
        group: Any = None,
    ) -> None:
        self._reader = RowReader(features, memory_budget, group)
        memory_budget = self._reader.memory_budget
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
        self.features = features
        self.num_samples = self._reader.num_samples
        self.num_features = self._reader.num_features
        self.memory_budget = memory_budget
        self.plan = plan_ridge(self.num_samples, self.num_features, memory_budget=memory_budget)
        self.method = self.plan.method if method is None else method
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.implementation = implementation
        only_exact = self.method == "svd"
        is_wide = self.num_samples <= self.num_features
        self._is_dual = is_wide if only_exact else self.method == "dual"
        self._factors = Factors(self._reader, is_dual=self._is_dual, only_exact=only_exact)

    def _checked_queries(self, queries: Tensor) -> Tensor:
        if queries.ndim != 2 or queries.shape[1] != self.num_features:
            raise ValueError(
                f"queries must be [M, {self.num_features}], got shape {tuple(queries.shape)}"
            )
        check_finite("queries", queries)
        return queries.to(torch.float64)

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
        return int(self._factors.spectrum_at(0.0).is_span.sum())

    def _refuse_cg(self, what: str) -> None:
        if self.method == "cg":
            raise ValueError(f"{what} must come from a factorisation, got method 'cg'")

    def scores(self, queries: Tensor, damping: float, *, out: Tensor | None = None) -> Tensor:
        """``queries (ΦᵀΦ + λI)⁻¹ Φᵀ``, computed in float64.

        Args:
            queries: ``[M, K]`` floating, on the features' device.
            damping: λ in units of ``gram``, finite; 0 only where the Gram has full rank.
            out: ``[M, n]`` float32 to write to (a memory-mapped file will do), or ``None``.

        Returns:
            ``[M, n]`` float32, positive = proponent.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: queries of the wrong width, a non-finite row (named) of either matrix, a
                negative or non-finite damping, λ = 0 on a singular Gram (the rank is named),
                ``out`` of the wrong shape or dtype, or conjugate gradients that did not converge
                (the residual is named).
        """
        queries = self._checked_queries(queries)
        damping = self._check_damping(damping)
        shape = (queries.shape[0], self._reader.num_rows)
        if out is None:
            out = queries.new_empty(shape, dtype=torch.float32)
        elif tuple(out.shape) != shape or out.dtype != torch.float32:
            raise ValueError(
                f"out must be {list(shape)} float32, got {list(out.shape)} {out.dtype}"
            )
        if self._is_dual:
            for start, stop, scores in self._dual_scores(queries, damping):
                out[start:stop] = scores[:, self._reader.own]
        else:
            preconditioned = self._inverse_at(damping)(queries)
            self._reader.times_rows(preconditioned, out)
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
        check_k(k, self.num_samples)
        if self._is_dual:
            parts = self._dual_scores(queries, damping)
            return join_queries([top_k(part, k) for _, _, part in parts])
        preconditioned = self._inverse_at(damping)(queries)
        reader = self._reader
        blocks = reader.blocks(width=queries.shape[0])
        scores = ((preconditioned @ rows.T).float() for _, _, rows in blocks)
        none = queries.new_empty(len(queries), 0, dtype=torch.float32)
        mine = rank_blocks(itertools.chain([none], scores), k, reader.own.start)
        return mine if reader.group.world == 1 else join_rows(_handed_round(mine, reader.group), k)

    def scores_sweep(self, queries: Tensor, dampings: Sequence[float]) -> Tensor:
        """:meth:`scores` for several dampings, for the price of one eigendecomposition.

        Args:
            queries: ``[M, K]`` floating.
            dampings: L values of λ in units of ``gram``.

        Returns:
            ``[L, M, n]`` float32. :meth:`iter_sweep` yields them one by one instead.

        Raises:
            ValueError: as for :meth:`scores`.
        """
        return torch.stack(list(self.iter_sweep(queries, dampings)))

    def iter_sweep(self, queries: Tensor, dampings: Sequence[float]) -> Iterator[Tensor]:
        """The ``[M, n]`` float32 scores of each damping in turn, one held at a time."""
        queries = self._checked_queries(queries)
        checked = [self._check_damping(damping) for damping in dampings]
        return self._sweep(queries, checked)

    def _sweep(self, queries: Tensor, dampings: Sequence[float]) -> Iterator[Tensor]:
        if self.method == "cg":
            for damping in dampings:
                yield self._times_rows(self._inverse_at(damping)(queries))
            return
        # one entry per spectrum in use, which this solver keeps alive: the Gram's, perhaps Φ's own
        rotated: dict[int, Tensor] = {}
        left = self._reader.cross(queries) if self._is_dual else queries
        for damping in dampings:
            spectrum = self._factors.spectrum_at(damping)
            if id(spectrum) not in rotated:
                rotated[id(spectrum)] = left @ spectrum.basis
            product = (rotated[id(spectrum)] * spectrum.inverse(damping)) @ spectrum.basis.T
            if self._is_dual:
                yield product[:, self._reader.own].float()
            else:
                yield self._times_rows(product)

    def preconditioned(self, damping: float) -> Tensor:
        """``Φ (ΦᵀΦ + λI)⁻¹``: what a query is multiplied with to give its scores.

        Returns:
            ``[n, K]`` float32, computed in float64.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: as for :meth:`scores`.
        """
        damping = self._check_damping(damping)
        if not self._is_dual:
            inverse = self._inverse_at(damping)
            none = torch.empty(0, self.num_features, device=self._reader.device)
            return torch.cat([none, *self._own_solutions(inverse)])
        factor = self._factors.cholesky_at(damping)
        blocks = []
        for columns in self._reader.columns():
            if factor is not None:
                blocks.append(torch.cholesky_solve(columns.T, factor).float())
            else:
                spectrum = self._factors.spectrum_at(damping)
                weighted = (columns @ spectrum.basis) * spectrum.inverse(damping)
                blocks.append((spectrum.basis @ weighted.T).float())
        return torch.cat(blocks, dim=1)[self._reader.own]

    def _own_solutions(self, inverse: Product) -> Iterator[Tensor]:
        """``inverse`` of this process's rows, ``[B, K]`` float32 each."""
        reader = self._reader
        if self.method != "cg" or reader.group.world == 1:
            yield from (inverse(rows).float() for _, _, rows in reader.blocks())
            return
        # every product takes all processes, so they solve for everybody's rows together
        for rank, _, rows in reader.everyones_blocks(reader.block_rows()):
            found = inverse(rows).float()
            if rank == reader.group.rank:
                yield found

    def inverse_times(self, queries: Tensor, damping: float) -> Tensor:
        """``Q (ΦᵀΦ + λI)⁻¹``.

        From the dual it is ``(Q - QΦᵀ(ΦΦᵀ + λI)⁻¹Φ) / λ``, whose error grows as 1 / λ (at λ = 0
        ``QΦᵀ(ΦΦᵀ)⁻²Φ``, the pseudo-inverse): for scores use :meth:`scores`, which does not pass
        through it.

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
        if not self._is_dual:
            return self._inverse_at(damping)(queries)
        spectrum = self._factors.spectrum_at(damping)
        inverse = spectrum.inverse(damping)
        # at λ = 0 the rows span every query, and G⁻¹ = Φᵀ D⁻² Φ
        weight = inverse if damping > 0.0 else inverse**2
        inner = (self._reader.cross(queries) @ spectrum.basis) * weight
        inner = inner @ spectrum.basis.T
        explained, inner = torch.zeros_like(queries), inner[:, self._reader.own]
        for start, stop, rows in self._reader.blocks():
            explained += inner[:, start:stop] @ rows
        explained = self._reader.group.sum(explained)
        return (queries - explained) / damping if damping > 0.0 else explained

    def _dual_scores(self, queries: Tensor, damping: float) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, scores [stop - start, N] float32)`` for blocks of queries."""
        inverse = self._inverse_at(damping)
        size = max(1, self.memory_budget // 8 // (24 * self.num_samples))
        # once for no queries, too: whoever joins the blocks wants one
        for start in range(0, max(1, queries.shape[0]), size):
            part = queries[start : start + size]
            yield start, start + part.shape[0], inverse(self._reader.cross(part)).float()

    def _inverse_at(self, damping: float) -> Product:
        """``Q [M, K] -> Q (G + λI)⁻¹`` float64; for the dual, ``[M, N]`` and D in place of G."""
        if self.method != "cg":
            return self._factors.inverse_at(damping)
        return iterative_inverse(
            self._reader,
            damping,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            implementation=self.implementation,
        )

    def _times_rows(self, preconditioned: Tensor) -> Tensor:
        """``[M, K] float64 -> [M, n] float32``, the product with Φᵀ."""
        shape = (preconditioned.shape[0], self._reader.num_rows)
        out = preconditioned.new_empty(shape, dtype=torch.float32)
        return self._reader.times_rows(preconditioned, out)

    def leverages(self, damping: float) -> Tensor:
        """The diagonal of ``Φ (ΦᵀΦ + λI)⁻¹ Φᵀ``: each training row's score on itself.

        Returns:
            ``[n]`` float64 in [0, 1).

        Raises:
            ValueError: a damping :meth:`scores` refuses, or method ``"cg"``.
        """
        self._refuse_cg("leverages")
        damping = self._check_damping(damping)
        spectrum = self._factors.spectrum_at(damping)
        return leverages(self._reader, spectrum, spectrum.inverse(damping)[:, None])[:, 0]

    def leave_one_out_residuals(self, targets: Tensor, damping: float) -> Tensor:
        """``y_i`` minus its prediction by ridge regression on every row but ``i``, exactly.

        Args:
            targets: ``[n]`` or ``[n, C]`` floating, regressed on ``features`` without intercept.
            damping: λ in units of ``gram``, the same for every fold.

        Returns:
            float64, shaped as ``targets``.

        Raises:
            ValueError: ``targets`` is not ``[n]`` or ``[n, C]``, or as for :meth:`leverages`.

        Source:
            Allen 1974 (PRESS); the identity ``(y − Hy) / (1 − h)`` holds for ridge regression
            without intercept.
        """
        y = check_targets(targets, self._reader.num_rows)
        self._refuse_cg("leverages")
        damping = self._check_damping(damping)
        spectrum = self._factors.spectrum_at(damping)
        inverse = spectrum.inverse(damping)
        fitted = fitted_values(self._reader, spectrum, inverse, y)
        left_out = 1.0 - leverages(self._reader, spectrum, inverse[:, None])
        return ((y - fitted) / left_out).reshape(targets.shape)

    def feature_norms(self) -> Tensor:
        """``‖φ_i‖₂`` of every training row, ``[n]`` float64."""
        # one tensor: many small ones between blocks that come and go keep the allocator from giving
        # their memory out again
        norms = self._reader.zeros(self._reader.num_rows)
        for start, stop, rows in self._reader.blocks():
            norms[start:stop] = torch.linalg.norm(rows, dim=1)
        return norms

    def mean_squared_norm(self) -> float:
        """The mean of ``‖φ_i‖₂²`` over all N training rows, in units of ``gram``."""
        squares = self.feature_norms().square()
        if self._reader.group.world == 1:
            return float(squares.mean())
        return float(self._reader.group.sum(squares.sum()) / self.num_samples)

    def preconditioned_norms(self, damping: float) -> Tensor:
        """``‖(ΦᵀΦ + λI)⁻¹ φ_i‖₂`` of every training row, ``[n]`` float64.

        Raises:
            TypeError: ``damping`` is not a number.
            ValueError: a damping :meth:`scores` refuses, or method ``"cg"``.
        """
        self._refuse_cg("preconditioned norms")
        damping = self._check_damping(damping)
        spectrum = self._factors.spectrum_at(damping)
        squared = spectrum.inverse(damping)[:, None] ** 2
        return leverages(self._reader, spectrum, squared)[:, 0].sqrt()

    def auto_damping(self, targets: Tensor | None = None) -> float:
        """A damping from the training features alone, by leave-one-out; no query is looked at.

        Without ``targets``: the λ under which each held-out feature row is likeliest given the
        others, rows equal bit for bit being left out together; `ridge_held_out` has the formula and
        the reasons. It measures the noise of the features, not of the model's training, so it is a
        cautious choice: where held-out *subset models* are at hand, prefer a λ chosen on half of
        them.

        With ``targets``: generalised cross-validation of the ridge regression of ``targets`` on the
        features, without intercept. Per-sample training outputs less their mean are a sensible
        target.

        Args:
            targets: ``[n]`` or ``[n, C]`` floating, or ``None``.

        Returns:
            λ in units of ``gram``, within [1e-10, 10] times the Gram's largest eigenvalue.

        Raises:
            ValueError: method ``"cg"``, features that are all zero, ``targets`` of the wrong shape,
                or ``targets`` whose criterion has no minimum inside that range.
        """
        self._refuse_cg("auto_damping")
        return choose_damping(self._reader, self._factors.eigenvalues(), targets)


def _handed_round(mine: TopK, group: Group) -> Iterator[TopK]:
    """Everybody's strongest rows in turn."""
    # lists may be of different lengths: the first dimension says so
    lists = (mine.proponents, mine.proponent_scores, mine.opponents, mine.opponent_scores)
    for parts in zip(*(group.each(each.T) for each in lists), strict=True):
        yield TopK(*(part.T for part in parts))
