"""Factorisations of the smaller Gram matrix, or of the features themselves, in float64.

    primal   G = ΦᵀΦ [K, K] = V S Vᵀ       dual   D = ΦΦᵀ [N, N] = U S Uᵀ
    svd      QR of Φ or Φᵀ, then the singular values of the triangle: no squared condition number

Index legend: N training rows, K features, R = K (primal) or N (dual), M rows to be solved for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import Product, accumulate_gram, mirror_lower
from .rows import RowReader

EPS = torch.finfo(torch.float64).eps
# a Gram form is trusted while λ + s_min >= _TRUST * s_max: its rounding, a few eps * s_max, then
# moves a score by less than 1e-6 of its size
_TRUST = 2.0**-26


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


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values ``s [R]`` and singular vectors ``basis [R, R]`` of the features.

    Attributes:
        s: in any order, none negative.
        basis: its columns are left singular vectors where ``is_dual``, else right ones.
        floor: the largest computed value that rounding could have made of an exact zero.
        is_dual: whether R is N.
        is_exact: whether Φ itself was decomposed, so that what lies above ``floor`` is real.
    """

    s: Tensor
    basis: Tensor
    floor: float
    is_dual: bool
    is_exact: bool

    @property
    def largest(self) -> float:
        """The largest of ``s``."""
        return float(self.s.max())

    @property
    def smallest(self) -> float:
        """The smallest of ``s``."""
        return float(self.s.min())

    @property
    def is_span(self) -> Tensor:
        """``[R]`` bool: not numerically zero, which belongs to no direction of the features."""
        return self.s > self.floor

    def inverse(self, damping: float) -> Tensor:
        """``1 / (s + λ)``, and 0 for what is numerically an exact zero of Φ.

        A direction no feature row has contributes nothing to a score, but its rounding error
        divided by a small λ would.
        """
        inverse = 1.0 / (self.s + damping)
        return torch.where(self.is_span, inverse, 0.0) if self.is_exact else inverse


class Factors:
    """What has been factorised so far: made when first asked for, then kept.

    Args:
        reader: of the features.
        is_dual: whether the Gram is ``ΦΦᵀ``.
        only_exact: always decompose the features, never a Gram.
    """

    def __init__(self, reader: RowReader, *, is_dual: bool, only_exact: bool) -> None:
        self.reader = reader
        self.is_dual = is_dual
        self.only_exact = only_exact
        # relative to σ_max, a singular value that may be an exact zero
        self._zero = max(reader.num_samples, reader.num_features) * EPS
        self._gram: Tensor | None = None
        self._eigen: Spectrum | None = None
        self._singular: Spectrum | None = None

    def inverse_at(self, damping: float) -> Product:
        """``left [M, R] -> left (G + λI)⁻¹``, or D for G where dual; factorised here, once."""
        factor = self.cholesky_at(damping)
        if factor is not None:
            return lambda left: torch.cholesky_solve(left.T, factor).T
        spectrum = self.spectrum_at(damping)
        inverse = spectrum.inverse(damping)
        return lambda left: ((left @ spectrum.basis) * inverse) @ spectrum.basis.T

    def cholesky_at(self, damping: float) -> Tensor | None:
        """The factor of the Gram at λ; ``None`` where eigenvalues are at hand or are needed."""
        if self.only_exact or self._eigen is not None:
            return None
        gram = self._gram_matrix()
        # the Frobenius norm bounds s_max from above
        if damping == 0.0 or damping < _TRUST * float(torch.linalg.norm(gram)):
            return None
        return cholesky(gram, damping)

    def spectrum_at(self, damping: float) -> Spectrum:
        """A spectrum whose inverse at λ is right to about 1e-6."""
        if not self.only_exact:
            eigen = self.eigenvalues()
            if damping + eigen.smallest >= _TRUST * eigen.largest:
                return eigen
        return self._singular_values()

    def eigenvalues(self) -> Spectrum:
        """The spectrum from the Gram."""
        if self._eigen is None:
            s, basis = torch.linalg.eigh(self._gram_matrix())
            floor = self._zero * float(s.max().clamp(min=0.0))
            self._eigen = Spectrum(s.clamp_(min=0.0), basis, floor, self.is_dual, is_exact=False)
        return self._eigen

    def _singular_values(self) -> Spectrum:
        """The spectrum from Φ itself: error eps * σ_max in σ, where a Gram has eps * σ_max**2."""
        if self._singular is not None:
            return self._singular
        reader = self.reader
        triangle: Tensor | None = None
        # of Φᵀ (dual) or Φ (primal): either way the right singular vectors are wanted
        for piece in reader.columns() if self.is_dual else (rows for _, _, rows in reader.blocks()):
            triangle = _add_rows(triangle, piece)
        if reader.group.world > 1 and not self.is_dual:
            mine = reader.zeros(0, reader.num_features) if triangle is None else triangle
            triangle = None
            for piece in reader.group.each(mine):
                triangle = _add_rows(triangle, piece)
        assert triangle is not None
        _, sigma, right = torch.linalg.svd(triangle, full_matrices=True)
        s = right.new_zeros(right.shape[0])
        s[: sigma.numel()] = sigma**2
        floor = (self._zero * float(sigma[0])) ** 2
        basis = right.T.contiguous()
        self._singular = Spectrum(s, basis, floor, self.is_dual, is_exact=True)
        return self._singular

    def _gram_matrix(self) -> Tensor:
        """``ΦᵀΦ [K, K]`` or ``ΦΦᵀ [N, N]`` in float64, both triangles."""
        if self._gram is None:
            lower = _dual_gram(self.reader) if self.is_dual else _primal_gram(self.reader)
            self._gram = mirror_lower(lower)
        return self._gram


def _add_rows(triangle: Tensor | None, rows: Tensor) -> Tensor:
    """The triangle of QR of the rows that gave ``triangle``, and of more rows."""
    stacked = rows if triangle is None else torch.cat([triangle, rows])
    found: Tensor = torch.linalg.qr(stacked, mode="r").R
    return found


def _primal_gram(reader: RowReader) -> Tensor:
    """The lower triangle of ``ΦᵀΦ [K, K]``, one pass over the rows."""
    gram = reader.zeros(reader.num_features, reader.num_features)
    for _, _, rows in reader.blocks():
        accumulate_gram(rows, gram)
    return reader.group.sum(gram)


def _dual_gram(reader: RowReader) -> Tensor:
    """The lower triangle of ``ΦΦᵀ [N, N]``."""
    if reader.group.world > 1:
        return _dual_gram_together(reader)
    N = reader.num_samples
    # wide, because every earlier row is read again for each of these blocks
    wide = max(1, reader.memory_budget // 8 // (8 * reader.num_features))
    narrow = reader.block_rows()
    gram = reader.zeros(N, N)
    for start in range(0, N, wide):
        stop = min(start + wide, N)
        left = reader.read(start, stop)
        accumulate_gram(left.T, gram[start:stop, start:stop])
        for other in range(0, start, narrow):
            end = min(other + narrow, start)
            gram[start:stop, other:end] = left @ reader.read(other, end).T
    return gram


def _dual_gram_together(reader: RowReader) -> Tensor:
    """The same: each process takes its own rows of it, against everybody's rows in turn."""
    mine = reader.zeros(reader.num_rows, reader.num_samples)
    wide = max(1, reader.memory_budget // 8 // (8 * reader.num_features))
    for rank, first, others in reader.everyones_blocks(wide):
        start = reader.first_of(rank) + first
        if start >= reader.own.stop:
            # above the diagonal
            continue
        for row, stop, rows in reader.blocks(width=len(others)):
            mine[row:stop, start : start + len(others)] = rows @ others.T
    return reader.group.join(mine)
