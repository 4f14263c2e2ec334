"""How noisy scores are, from some training images with other noise and from half differences.

Letters: M queries, N training samples, K features, J of the training samples with other noise, G
groups. A score is ``s = ψᵀAφ`` with ``A = (ΦᵀΦ + λI)⁻¹``, and Φ is as noisy as ψ. By the law of
total variance, with e the noise of a query,

    Var s = mean (eᵀAφ)² + what the score of the query without its noise moves with φ's

The first is exact, A and φ being as noisy as they are. Its e are the noises of the J images, which
are of the same kind as a query's, once an image is no part of A: ``A₋ⱼ``, by Sherman and Morrison.
The second is how far ``s`` moves when the features of image j are replaced by those with other
noise, leverage and all: the score of j itself, and through A those of all others. Of both, what
``eᵀAφ`` moves is in the first already, and of the latter what ``ψᵀAd`` moves is in the former.

All are of typical noise. That of a query goes by its half difference, scored on all training
images, against those of the J images; that of a training image by ``(1 - h)²‖d‖²``, h its leverage
and d its half difference. A half difference is one draw, and holds whatever differs between the
timesteps of the halves besides: it says how large one image's noise is against another's, as far as
half differences differ by more than by chance, and nothing else.

What moves through A is spread over the training images as ``eᵀAφ`` is. Errors of one query share
e, and are correlated: `group_errors` counts that.

Source:
    Efron and Stein 1981 (Annals of Statistics 9, 586) for replacing one at a time; the shrinkage is
    that of Smyth 2004 (doi:10.2202/1544-6115.1027), by moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

from ..features.halves import Columns

# training images with other noise, and rows that are read at once
_REPEATED, _ROWS = 64, 512


def repeated_rows(num_train: int) -> list[int]:
    """Which training images are given other noise: `_REPEATED` of them, evenly spaced."""
    count = min(_REPEATED, num_train)
    return [place * num_train // count for place in range(count)]


@dataclass(frozen=True, eq=False)
class ScoreNoise:
    """What the errors of scores are made of, float64.

    Attributes:
        along: ``[J, N]``, what noises score on each training image; NaN for an image's own.
        query: ``[M]``, ‖e‖² in those of typical noise, and what moves through A.
        train: ``[N]``, what noise of a training image does, in that of typical noise.
        moves: ``[M]``, the mean square that scores move with typical noise of their own φ.
    """

    along: Tensor
    query: Tensor
    train: Tensor
    moves: Tensor

    @classmethod
    def measure(
        cls,
        solver: RidgeSolver,
        queries: Tensor,
        query_noise: Tensor,
        train: Columns,
        train_noise: Columns,
        repeats: Tensor,
        damping: float,
    ) -> ScoreNoise:
        """From features, their half differences, and some features with other noise.

        Args:
            solver: on the training features.
            queries: ``[M, K]`` features.
            query_noise: ``[M, K]``, their half differences.
            train: ``[N, K]``, the training features.
            train_noise: ``[N, K]``, their half differences.
            repeats: ``[J, K]``, features of the images `repeated_rows` with other noise.
            damping: λ in units of the Gram.

        Raises:
            ValueError: as `RidgeSolver.leverages`, or there are fewer than 3 training images, or
                nothing differs between halves.
        """
        N = len(train_noise)
        if N < 3:
            raise ValueError(f"--noise-halves must have at least 3 training images, got {N}")
        rows = repeated_rows(N)
        blocks = range(0, N, _ROWS)
        common = sum(train_noise[i : i + _ROWS].double().sum(0) for i in blocks) / N
        energy = torch.cat(
            [(train_noise[i : i + _ROWS].double() - common).square().sum(1) for i in blocks]
        )
        if not bool((energy > 0).all()):
            raise ValueError("halves of timesteps must differ, got a feature without any noise")
        h = solver.leverages(damping)
        images = torch.cat([train[n : n + 1] for n in rows])
        replaced = _Replaced.measure(solver, images, repeats, h[rows], rows, damping)
        halves = torch.cat([train_noise[n : n + 1] for n in rows]).double() - common
        # of half differences: they are compared with each other only
        typical = replaced.leave_out(solver.scores(halves, damping).double(), rows)
        sizes = typical.square().nanmean(1)
        scored = solver.scores(query_noise.double() - common, damping).double()
        query = scored.square().mean(1) / sizes.mean()
        # with one query more, of typical noise
        centre = (1 + query.sum()) / (1 + len(query))
        query = centre + _beyond_chance(sizes, torch.nan_to_num(replaced.along)) * (query - centre)
        size = energy * (1 - h).square()
        size = size / size[rows].mean()
        noise = 1 + _beyond_chance(size[rows], halves) * (size - 1)
        moves, through = (part.clamp(min=0) for part in replaced.moves(queries, query))
        through = (N - 1) * through / replaced.along.square().nanmean()
        return cls(replaced.along, query + through, noise, moves)

    def errors(self) -> Tensor:
        """Standard errors of the scores, ``[M, N]`` float32."""
        return self._combine(self.along.square().nanmean(0), self.train)

    def group_errors(self, members: Tensor) -> Tensor:
        """Standard errors of sums of scores, ``[M, G]`` float32.

        Args:
            members: ``[N, G]`` bool, which training images each group has.
        """
        inside = members.double()
        sums = torch.nan_to_num(self.along) @ inside
        return self._combine(sums.square().mean(0), self.train @ inside)

    def _combine(self, along: Tensor, noise: Tensor) -> Tensor:
        return (self.query[:, None] * along + self.moves[:, None] * noise).sqrt().float()

    def reliabilities(self, scores: Tensor) -> Tensor:
        """Expected correlation of a query's scores with those of other noise, ``[M]`` float32.

        Args:
            scores: ``[M, N]``.
        """
        each = self.along.square().nanmean()
        # what all scores of a query have in common moves no correlation
        shared = self.along.nanmean(1).square().mean()
        noise = self.query * (each - shared) + self.moves * self.train.mean()
        return (1 - noise / scores.double().var(1)).clamp(0, 1).float()


@dataclass(frozen=True, eq=False)
class _Replaced:
    """J images with other noise in place of what they had, one at a time; float64.

    Attributes:
        solver: as it was, on the features φ.
        damping: of it.
        repeats: ``[J, K]``, features φ' with other noise.
        pulled: ``[J, K]``, ``φ'ᵀA``.
        scores: ``[J, N]``, ``φⱼᵀAφ``.
        rows: which images these are.
        own: ``[J]``, ``φᵀAφ'``.
        norms: ``[J]``, ``φ'ᵀAφ'``.
        gain: ``[J]``, ``1 / (1 - φᵀAφ)``: ``A₋ⱼ = A + gain · AφⱼφⱼᵀA``.
        along: ``[J, N]``, noises scored as those of queries, ``eⱼᵀA₋ⱼφ``; NaN for image j itself.
        between: ``[J, J]``, ``φᵀAφ'``; of two images.
        noisy: ``[J, J]``, ``eₖᵀA₋ₖφ'``.
    """

    solver: RidgeSolver
    damping: float
    repeats: Tensor
    pulled: Tensor
    scores: Tensor
    rows: list[int]
    own: Tensor
    norms: Tensor
    gain: Tensor
    along: Tensor
    between: Tensor
    noisy: Tensor

    @classmethod
    def measure(
        cls,
        solver: RidgeSolver,
        images: Tensor,
        repeats: Tensor,
        leverages: Tensor,
        rows: list[int],
        damping: float,
    ) -> _Replaced:
        """From features φ and φ', both ``[J, K]``, and leverages ``[J]``."""
        images, repeats, gain = images.double(), repeats.double(), 1 / (1 - leverages)
        scores = solver.scores(images, damping).double()
        new = solver.scores(repeats, damping).double()
        pulled, between = solver.inverse_times(repeats, damping), new[:, rows].T
        # two draws differ by twice the variance of one
        noise, change = (repeats - images) / 2**0.5, (new - scores) / 2**0.5
        along = _leave_out(change, scores, gain, rows)
        own_change = change[range(len(rows)), rows]
        return cls(
            solver,
            damping,
            repeats,
            pulled,
            scores,
            rows,
            between.diagonal(),
            (pulled * repeats).sum(1),
            gain,
            along,
            between,
            noise @ pulled.T + (gain * own_change)[:, None] * between,
        )

    def leave_out(self, along: Tensor, rows: list[int]) -> Tensor:
        """``xⱼᵀA₋ⱼφ`` from ``xⱼᵀAφ [J, N]``; NaN for image j itself."""
        return _leave_out(along, self.scores, self.gain, rows)

    def moves(self, queries: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squares that scores of queries ``[M, K]`` without their noise move, ``[M]`` each.

        Args:
            queries: ψ, with their noise.
            sizes: ``[M]``, of their noise.

        Returns:
            Of the score of the image that is replaced, and of another one's.
        """
        old = self.solver.scores(queries, self.damping).double()[:, self.rows]
        new = queries.double() @ self.pulled.T
        among, noise = self.scores[:, self.rows], self.along[:, self.rows]
        own = _moved(old, new, self.own, self.gain, self.norms)
        # noise k in place of a query, image k being no part of A: row k, column j
        step = self.gain[:, None]
        own_of_noise = _moved(
            noise,
            self.noisy,
            self.own + step * self.between * among,
            1 / (1 / self.gain - step * among.square()),
            self.norms + step * self.between.square(),
        )
        others = self._through(old, new)
        others_of_noise = self._through(noise, self.noisy).nanmean()
        return (
            own.mean(1) - sizes * own_of_noise.nanmean(),
            others - sizes * others_of_noise,
        )

    def _through(self, old: Tensor, new: Tensor) -> Tensor:
        """What moves scores of x on the others of the J images, without their noise, ``[X]``.

        Args:
            old: ``[X, J]``, ``xᵀAφ``; NaN where x is not to be scored by an image.
            new: ``[X, J]``, ``xᵀAφ'``.
        """
        shrink = 1 / self.gain[:, None]
        ways = (
            (self.scores[:, self.rows], self.between, 1.0),
            (shrink * self.along[:, self.rows], shrink * self.noisy, -1.0),
        )
        own, gain = self.own, self.gain
        replaced = 1 + self.norms + own.square() * gain
        total, count = torch.zeros(len(old)).double(), torch.zeros(len(old)).double()
        for j in range(len(own)):
            place = torch.arange(len(own)) != j
            x = (old[:, j] * gain[j], new[:, j] + old[:, j] * own[j] * gain[j])
            count += torch.isfinite(x[0]) * int(place.sum())
            for before, after, sign in ways:
                one, other = before[place, j], after[place, j]
                change = torch.outer(x[1], other + one * own[j] * gain[j]) / replaced[j]
                change -= torch.outer(x[0], one)
                total += sign * torch.nan_to_num(change.square().sum(1) / 2)
        return total / count


def _leave_out(along: Tensor, scores: Tensor, gain: Tensor, rows: list[int]) -> Tensor:
    own = along[range(len(rows)), rows]
    found = along + (gain * own)[:, None] * scores
    found[range(len(rows)), rows] = torch.nan
    return found


def _moved(old: Tensor, new: Tensor, own: Tensor, gain: Tensor, norms: Tensor) -> Tensor:
    """Half the square of ``xᵀA'φ' - xᵀAφ``, φ' in place of φ in A' as well.

    Args:
        old: ``xᵀAφ``.
        new: ``xᵀAφ'``.
        own: ``φᵀAφ'``.
        gain: ``1 / (1 - φᵀAφ)``.
        norms: ``φ'ᵀAφ'``.
    """
    # without φ first, and then with φ'
    without = new + old * own * gain
    return (without / (1 + norms + own.square() * gain) - old).square() / 2


def _beyond_chance(sizes: Tensor, draws: Tensor) -> float:
    """The part of the spread of sizes that is more than chance, in [0, 1].

    Args:
        sizes: ``[J]``, squared norms, each of one draw.
        draws: ``[J, D]``, what they are norms of, or like it.
    """
    products = draws @ draws.T
    squares = products.diagonal()
    J = len(squares)
    apart = (products.square().sum() - squares.square().sum()) / (J * (J - 1))
    # of squared norms of draws of one covariance: twice tr C² / (tr C)²
    chance = float(2 * apart / squares.mean().square())
    spread = float(sizes.var() / sizes.mean().square())
    real = max(0.0, (1 + spread) / (1 + chance) - 1)
    return real / spread if real else 0.0
