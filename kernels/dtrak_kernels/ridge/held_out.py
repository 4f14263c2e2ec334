r"""What training rows say when they are left out: leverages, residuals, and a choice of damping.

Without targets, the damping is the λ under which each held-out feature row is likeliest given the
others, the minimum over λ of

.. math:: \sum_{j \le r} \log(s_j + \lambda) + \frac1N \sum_i
    \Big[ \log(1 - m_i h_i) + (N - m_i) \frac{h_i}{1 - m_i h_i} \Big]

which is minus twice the log density, up to constants, of row i under the normal distribution on the
r-dimensional span of the rows whose covariance is the damped second moment of the rest,
``(G - m_i φ_i φ_iᵀ + λI) / (N - m_i)``. ``s`` are the eigenvalues of the Gram, ``h`` the leverages,
and ``m_i`` is how many rows equal row i bit for bit: copies are left out together, or a row would
be predicted by itself. Zero rows are not counted.

Why not a regression target: with the scores' own, the constant 1 (the sum over training rows of a
query's scores *is* the ridge prediction of 1), the optimum is infinite where gradients average to
zero, as they do for a trained loss; with the kernel rows themselves as targets there is no noise,
and it is 0. The density always has its optimum inside: it falls without bound for λ → 0 where rows
are independent and for λ → ∞ always, and its derivative at 0 is positive where N > K. It depends on
Φ only through ΦΦᵀ, so zero columns and rotations do not matter; it scales by c² when the features
do, and doubles when every row is doubled. It measures the noise of the features, not of the model's
training, so it is a cautious choice: where held-out *subset models* are at hand, prefer a λ chosen
on half of them.

With targets, it is generalised cross-validation: the minimum of ``N ‖(I - H) y‖² / tr(I - H)²``.

Index legend: N training rows, n of them in this process, K features, C targets, L dampings, R as in
`factors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .factors import EPS, Spectrum
from .rows import RowReader

# a damping is looked for between these multiples of the largest eigenvalue
_LOWEST, _HIGHEST = 1e-10, 10.0
# points of the grid that spans them, and of the finer ones between the neighbours of the best
_POINTS = (67, 33, 33)


def check_targets(targets: Tensor, num_samples: int) -> Tensor:
    """``targets`` as ``[N, C]`` float64, refused unless ``[N]`` or ``[N, C]``."""
    if targets.ndim not in (1, 2) or targets.shape[0] != num_samples:
        raise ValueError(
            f"targets must be [{num_samples}] or [{num_samples}, C], "
            f"got shape {tuple(targets.shape)}"
        )
    targets = targets.to(torch.float64)
    return targets[:, None] if targets.ndim == 1 else targets


def leverages(reader: RowReader, spectrum: Spectrum, inverse: Tensor) -> Tensor:
    """``[n, L]`` diagonals of ``Φ V diag(inverse) Vᵀ Φᵀ`` for ``inverse [R, L]``, in one pass."""
    if spectrum.is_dual:
        return spectrum.basis[reader.own] ** 2 @ (spectrum.s[:, None] * inverse)
    found = inverse.new_empty(reader.num_rows, inverse.shape[1])
    for start, stop, rows in reader.blocks():
        found[start:stop] = (rows @ spectrum.basis) ** 2 @ inverse
    return found


def fitted_values(
    reader: RowReader, spectrum: Spectrum, inverse: Tensor, targets: Tensor
) -> Tensor:
    """``Φ (G + λI)⁻¹ Φᵀ targets [n, C]`` float64, for ``inverse [R]`` and ``targets [n, C]``."""
    basis = spectrum.basis
    if spectrum.is_dual:
        basis, weight = basis[reader.own], (spectrum.s * inverse)[:, None]
        return basis @ (weight * reader.group.sum(basis.T @ targets))
    coefficients = basis @ (inverse[:, None] * (basis.T @ reader.moment(targets)))
    fitted = targets.new_empty(reader.num_rows, targets.shape[1])
    for start, stop, rows in reader.blocks():
        fitted[start:stop] = rows @ coefficients
    return fitted


def choose_damping(reader: RowReader, spectrum: Spectrum, targets: Tensor | None) -> float:
    """The minimum of the criterion above, by a grid of λ and two finer ones.

    Args:
        reader: of the features.
        spectrum: of their Gram.
        targets: ``[N]`` or ``[N, C]`` floating, or ``None``.

    Raises:
        ValueError: features that are all zero, ``targets`` of the wrong shape, or ``targets`` whose
            criterion has no minimum inside the grid.

    Source:
        Density: leave-one-out likelihood for a regularised covariance, Hoffbeck and Landgrebe
        1996 (IEEE PAMI 18, 763). Targets: Golub, Heath and Wahba 1979 (Technometrics 21, 215).
    """
    if spectrum.largest == 0.0:
        raise ValueError("features must have a non-zero row to choose a damping, got none")
    low, high = _LOWEST * spectrum.largest, _HIGHEST * spectrum.largest
    if targets is None:
        criterion = _held_out_density(reader, spectrum)
    else:
        criterion = _cross_validation(reader, spectrum, check_targets(targets, reader.num_rows))
    for search, points in enumerate(_POINTS):
        exponents = torch.linspace(
            math.log(low), math.log(high), points, dtype=torch.float64, device=spectrum.s.device
        )
        grid = exponents.exp()
        best = int(criterion(grid).argmin())
        if targets is not None and search == 0 and best in (0, points - 1):
            raise ValueError(
                "targets must have a cross-validation minimum at a damping between "
                f"{low:.3g} and {high:.3g}, got it at the end {float(grid[best]):.3g}"
            )
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
    return float(grid[best])


def _held_out_density(reader: RowReader, spectrum: Spectrum) -> Callable[[Tensor], Tensor]:
    """The criterion without targets, a function of dampings ``grid [L]``."""
    copies, is_zero = _duplicates(reader)
    m = copies[~is_zero][:, None]
    counted = float(reader.group.sum(copies.new_tensor(len(m))))
    span = spectrum.s[spectrum.is_span]

    def criterion(grid: Tensor) -> Tensor:
        h = leverages(reader, spectrum, 1.0 / (spectrum.s[:, None] + grid))[~is_zero]
        left_out = (1.0 - m * h).clamp(min=EPS)
        misfit = torch.log(left_out) + (counted - m) * h / left_out
        mean = reader.group.sum(misfit.sum(dim=0)) / counted
        return torch.log(span[:, None] + grid).sum(dim=0) + mean

    return criterion


def _cross_validation(
    reader: RowReader, spectrum: Spectrum, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """The criterion with ``targets [n, C]``, a function of dampings ``grid [L]``."""
    is_span = spectrum.is_span
    if spectrum.is_dual:
        along = reader.group.sum(spectrum.basis[reader.own].T @ targets)
    else:
        sigma = torch.where(is_span, spectrum.s, 1.0).sqrt()
        along = (spectrum.basis.T @ reader.moment(targets)) / sigma[:, None]
    energy = torch.where(is_span, (along**2).sum(dim=1), 0.0)
    outside = (reader.group.sum((targets**2).sum()) - energy.sum()).clamp(min=0.0)

    def criterion(grid: Tensor) -> Tensor:
        shrink = grid / (spectrum.s[:, None] + grid)
        residual = outside + energy @ shrink**2
        fitted = (1.0 - shrink)[is_span].sum(dim=0)
        return reader.num_samples * residual / (reader.num_samples - fitted) ** 2

    return criterion


def _duplicates(reader: RowReader) -> tuple[Tensor, Tensor]:
    """How many rows equal each row bit for bit ``[n] float64``, and which are zero ``[n]``."""
    keys = torch.empty(reader.num_rows, dtype=torch.int64, device=reader.device)
    zeros = torch.empty(reader.num_rows, dtype=torch.bool, device=reader.device)
    for start, stop, rows in reader.blocks():
        # adding 0.0 makes one zero of the two
        words = (rows + 0.0).view(torch.int64)
        # an odd multiplier for each column; int64 wraps, so the order of the sum is immaterial
        columns = torch.arange(reader.num_features, device=rows.device, dtype=torch.int64)
        mixed = (words ^ (words >> 29)) * (columns * -7046029254386353131 * 2 + 1)
        keys[start:stop] = (mixed ^ (mixed >> 32)).sum(dim=1)
        zeros[start:stop] = (rows == 0).all(dim=1)
    every = reader.group.join(keys)
    _, kind, counts = torch.unique(every, return_inverse=True, return_counts=True)
    return counts[kind[reader.own]].to(torch.float64), zeros
