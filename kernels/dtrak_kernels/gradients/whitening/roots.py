"""Inverse square roots of second moments, dense or of low rank, one for every group of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

# a second moment wider than this is sketched as it streams by, never formed or decomposed
MOST_DENSE = 1024
# directions of that sketch beyond the rank
_OVERSAMPLING = 32


@dataclass(frozen=True)
class DenseRoot:
    """``X^(-1/2)`` as a matrix.

    Attributes:
        matrix: ``[g, n, n]``, symmetric; one for each of g groups.
    """

    matrix: Tensor
    fields: ClassVar[tuple[str, ...]] = ("matrix",)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.matrix.dtype

    @property
    def groups(self) -> int:
        """``g``."""
        return self.matrix.shape[0]

    @property
    def size(self) -> int:
        """``n``, of one group."""
        return self.matrix.shape[1]

    @property
    def flop(self) -> int:
        """Multiplications and additions for one vector of n numbers."""
        return 2 * self.size**2

    def to(self, device: torch.device, dtype: torch.dtype) -> DenseRoot:
        """The same on a device, in a dtype."""
        return DenseRoot(*(getattr(self, field).to(device, dtype) for field in self.fields))

    def of_group(self, group: int) -> DenseRoot:
        """The root of one group."""
        return DenseRoot(self.matrix[group : group + 1])

    def apply(self, values: Tensor) -> Tensor:
        """``[..., g, m, n]`` to the same, each vector of n times its group's root."""
        return values @ (self.matrix[0] if self.groups == 1 else self.matrix)

    def apply_left(self, values: Tensor) -> Tensor:
        """``[..., g, n, m]`` to the same."""
        return (self.matrix[0] if self.groups == 1 else self.matrix) @ values


@dataclass(frozen=True)
class LowRankRoot:
    """``X^(-1/2)`` as a multiple of the identity and r directions: ``c · 1 + U D Uᵀ``.

    Attributes:
        constant: ``c [g]``, of the directions that are not told apart.
        basis: ``U [g, n, r]``, orthonormal: the r largest eigenvectors of X.
        gains: ``D [g, r]``, negative where these have more than the others.
    """

    constant: Tensor
    basis: Tensor
    gains: Tensor
    fields: ClassVar[tuple[str, ...]] = ("constant", "basis", "gains")

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.basis.dtype

    @cached_property
    def factor(self) -> float:
        """``c`` of a layer without groups."""
        return float(self.constant[0])

    @property
    def groups(self) -> int:
        """``g``."""
        return self.basis.shape[0]

    @property
    def size(self) -> int:
        """``n``, of one group."""
        return self.basis.shape[1]

    @property
    def flop(self) -> int:
        """Multiplications and additions for one vector of n numbers."""
        return 4 * self.size * self.basis.shape[2]

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRankRoot:
        """The same on a device, in a dtype."""
        return LowRankRoot(*(getattr(self, field).to(device, dtype) for field in self.fields))

    @cached_property
    def is_short(self) -> bool:
        """Whether bfloat16 holds its directions exactly."""
        return torch.equal(self.basis, self.basis.bfloat16().to(self.dtype))

    def shortened(self) -> LowRankRoot:
        """The same with directions that bfloat16 holds: a map like it, and orthonormal nearly."""
        basis = self.basis.bfloat16().to(self.dtype)
        return LowRankRoot(self.constant, basis, self.gains)

    def of_group(self, group: int) -> LowRankRoot:
        """The root of one group."""
        part = slice(group, group + 1)
        return LowRankRoot(self.constant[part], self.basis[part], self.gains[part])

    def apply(self, values: Tensor) -> Tensor:
        """``[..., g, m, n]`` to the same, each vector of n times its group's root."""
        if self.groups == 1:
            thin = (values @ self.basis[0]) * self.gains[0]
            return torch.add(thin @ self.basis[0].mT, values * self.constant[0])
        thin = (values @ self.basis) * self.gains[:, None]
        return thin @ self.basis.mT + values * self.constant[:, None, None]

    def apply_left(self, values: Tensor) -> Tensor:
        """``[..., g, n, m]`` to the same."""
        if self.groups == 1:
            thin = (self.basis[0].mT @ values) * self.gains[0, :, None]
            return self.basis[0] @ thin + values * self.constant[0]
        thin = (self.basis.mT @ values) * self.gains[:, :, None]
        return self.basis @ thin + values * self.constant[:, None, None]


Root = DenseRoot | LowRankRoot


def apply_to_channels(root: Root, x: Tensor) -> Tensor:
    """A root on the channels of images ``[R, g·n, *spatial]``, group by group."""
    values = x.flatten(2)
    if root.groups > 1:
        values = values.unflatten(1, (root.groups, root.size))
    return root.apply_left(values).reshape(x.shape)


class DenseMoment:
    """The mean of ``v vᵀ`` over vectors that stream by, for every group.

    Args:
        groups: ``g``.
        size: ``n``.
        device: of the sums.
    """

    def __init__(self, groups: int, size: int, device: torch.device) -> None:
        self.total = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Add vectors ``[N, g, n]``."""
        by_group = values.transpose(0, 1)
        self.total += by_group.mT @ by_group
        self.count += len(values)

    def root(self, damping: float, rank: int | None) -> Root:
        """The inverse square root of the damped moment, float64.

        Args:
            damping: ``ρ``: ``ρ · tr(X)/n`` is added to every eigenvalue.
            rank: r, or None for all eigenvalues.
        """
        moment = self.total / max(self.count, 1)
        values, vectors = torch.linalg.eigh(moment)
        trace = moment.diagonal(dim1=1, dim2=2).sum(1)
        if rank is not None and rank < values.shape[1]:
            return _low_rank(values[:, -rank:], vectors[:, :, -rank:], trace, damping)
        scales = _inverse_roots(values, trace / values.shape[1], damping)
        return DenseRoot((vectors * scales[:, None]) @ vectors.mT)


class SketchedMoment:
    """The largest eigenvectors of a second moment too wide to be formed, from one pass.

    Args:
        groups: ``g``.
        size: ``n``.
        rank: r.
        device: of the sums.

    Source:
        The Nyström approximation of a positive semidefinite matrix from its product with a random
        one, Tropp, Yurtsever, Udell and Cevher 2017 (arXiv:1706.05736), algorithm 3.
    """

    def __init__(self, groups: int, size: int, rank: int, device: torch.device) -> None:
        self._rank, width = rank, min(size, 2 * rank + _OVERSAMPLING)
        noise = torch.randn(
            size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
        )
        self._test = torch.linalg.qr(noise)[0].to(device)
        self._product = torch.zeros(groups, size, width, dtype=torch.float64, device=device)
        self._trace = torch.zeros(groups, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Add vectors ``[N, g, n]``."""
        by_group = values.transpose(0, 1)
        self._product += by_group.mT @ (by_group @ self._test.to(values.dtype))
        self._trace += by_group.square().sum((1, 2), dtype=torch.float64)
        self.count += len(values)

    def root(self, damping: float, rank: int | None) -> Root:
        """The inverse square root of the damped moment, of rank r: see `DenseMoment.root`."""
        product, trace = self._product / max(self.count, 1), self._trace / max(self.count, 1)
        # as small as rounding allows, and positive where nothing streamed by
        shift = torch.finfo(torch.float64).eps * product.norm(dim=(1, 2)).clamp_min(1e-300)
        shift = shift[:, None, None] * product.shape[1] ** 0.5
        product = product + shift * self._test
        core = self._test.mT @ product
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        keep = values > shift[:, 0] * 0.5
        inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0.0)
        basis, roots, _ = torch.linalg.svd(
            product @ (vectors * inverse[:, None]), full_matrices=False
        )
        found = (roots.square() - shift[:, 0]).clamp_min(0)
        rank = min(self._rank, found.shape[1])
        return _low_rank(found[:, :rank], basis[:, :, :rank], trace, damping)


def _inverse_roots(values: Tensor, mean: Tensor, damping: float) -> Tensor:
    """``(λ + ρ · mean)^(-1/2)`` of eigenvalues ``[g, m]``; 1 for a group whose moment is zero."""
    damped = values.clamp_min(0) + damping * mean[:, None]
    return torch.where(damped > 0, damped, 1.0).rsqrt()


def _low_rank(values: Tensor, vectors: Tensor, trace: Tensor, damping: float) -> Root:
    """The root of a moment known by its largest eigenvalues ``[g, r]`` and its trace ``[g]``."""
    size, rank = vectors.shape[1:]
    mean = trace / size
    rest = ((trace - values.sum(1)) / max(size - rank, 1)).clamp_min(0)
    constant = _inverse_roots(rest[:, None], mean, damping)[:, 0]
    gains = _inverse_roots(values, mean, damping) - constant[:, None]
    root = LowRankRoot(constant, vectors.contiguous(), gains)
    if 2 * rank < size:
        return root
    # two thin products would cost more than one
    eye = torch.eye(size, dtype=vectors.dtype, device=vectors.device)
    return DenseRoot(root.apply(eye.expand(root.groups, size, size)))
