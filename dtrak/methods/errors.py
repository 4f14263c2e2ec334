"""How noisy scores are, from half the difference of two halves of every feature.

Letters: M queries, N training samples, K features, I samples of noise, G groups. A score is
``s = ψᵀAφ`` with ``A = (ΦᵀΦ + λI)⁻¹``. With noise e in ψ and d in φ it errs by

    eᵀAφ + (1 - h) ψᵀA d - (1 - h) eᵀA d        h the leverage of φ, which is in ΦᵀΦ itself

whose last term is in both others once they are taken at noisy ψ and φ. A query and a training image
have one realisation of their noise each, so variances are pooled:

    Var s = ‖e‖² E + (V - ‖e‖² W) ‖d‖² (1 - h)²

``E = mean (uᵀAφ)²``, ``V = mean (ψᵀAu)²``, ``W = mean (uᵀAu')²`` over directions u of the noise of
other training images; E is W ‖d‖² (1 - h)² and the rest, pooled over training images in proportion
to ‖φ‖² (1 - h)². What all images have in common in their difference is no noise and is left out.
Errors of one query share e, and are correlated: `group_errors` counts that.

Source:
    The variance of a product of independent estimates (Goodman 1960, JASA 55, 708), in the
    directions of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

from ..features.halves import Columns

# directions of noise that variances are pooled over, and rows that are read at once
_DIRECTIONS, _ROWS = 512, 512


@dataclass(frozen=True, eq=False)
class ScoreNoise:
    """What the errors of scores are made of, float64.

    Attributes:
        along: ``[I, N]``, what directions of noise score on each training image.
        query: ``[M]``, ‖e‖².
        train: ``[N]``, ‖d‖² (1 - h)².
        sizes: ``[N]``, ‖φ‖² (1 - h)².
        across: ``[M]``, V.
        both: W, no more than what E has room for.
    """

    along: Tensor
    query: Tensor
    train: Tensor
    sizes: Tensor
    across: Tensor
    both: float

    @classmethod
    def measure(
        cls,
        solver: RidgeSolver,
        queries: Tensor,
        query_noise: Tensor,
        train_noise: Columns,
        damping: float,
    ) -> ScoreNoise:
        """From features and their half differences.

        Args:
            solver: on the training features.
            queries: ``[M, K]`` features.
            query_noise: ``[M, K]``, their half differences.
            train_noise: ``[N, K]``, those of the training features.
            damping: λ in units of the Gram.

        Raises:
            ValueError: as `RidgeSolver.leverages`, or there are fewer than 3 training images, or
                nothing differs between halves.
        """
        N = len(train_noise)
        if N < 3:
            raise ValueError(f"--noise-halves must have at least 3 training images, got {N}")
        blocks = range(0, N, _ROWS)
        common = sum(train_noise[i : i + _ROWS].double().sum(0) for i in blocks) / N
        count = min(_DIRECTIONS, N)
        chosen = torch.tensor([place * N // count for place in range(count)])
        energies, directions = [], []
        for first in blocks:
            rows = train_noise[first : first + _ROWS].double() - common
            energies.append(rows.square().sum(1))
            directions.append(rows[chosen[(chosen >= first) & (chosen < first + _ROWS)] - first])
        energy, u = torch.cat(energies), torch.cat(directions)
        if not bool((energy > 0).all()):
            raise ValueError("halves of timesteps must differ, got a feature without any noise")
        u /= energy[chosen].sqrt()[:, None]
        own = (1 - solver.leverages(damping)).square()
        along = solver.scores(u, damping).double()
        # a direction is no judge of the image it comes from
        along[torch.arange(count), chosen] = torch.nan
        products = solver.inverse_times(u, damping) @ u.T
        others = products.square().sum() - products.diagonal().square().sum()
        both = min(
            float(others / (count * (count - 1))),
            float(along.square().nanmean() / (energy * own).mean()),
        )
        return cls(
            along,
            (query_noise.double() - common).square().sum(1),
            energy * own,
            solver.feature_norms().double().square() * own,
            (solver.inverse_times(queries, damping) @ u.T).square().mean(1),
            both,
        )

    def errors(self) -> Tensor:
        """Standard errors of the scores, ``[M, N]`` float32."""
        each = self.along.square().nanmean()
        rest = (each - self.both * self.train.mean()) / self.sizes.mean()
        return self._combine(self.both * self.train + rest * self.sizes, self.train)

    def group_errors(self, members: Tensor) -> Tensor:
        """Standard errors of sums of scores, ``[M, G]`` float32.

        Args:
            members: ``[N, G]`` bool, which training images each group has.
        """
        inside = members.double()
        sums = torch.nan_to_num(self.along) @ inside
        return self._combine(sums.square().mean(0), self.train @ inside)

    def _combine(self, each: Tensor, noise: Tensor) -> Tensor:
        beyond = (self.across - self.both * self.query).clamp(min=0)
        return (self.query[:, None] * each + beyond[:, None] * noise).sqrt().float()

    def reliabilities(self, scores: Tensor) -> Tensor:
        """Expected correlation of a query's scores with those of other noise, ``[M]`` float32.

        Args:
            scores: ``[M, N]``.
        """
        noise = self.errors().double().square().mean(1)
        return (1 - noise / scores.double().var(1)).clamp(0, 1).float()
