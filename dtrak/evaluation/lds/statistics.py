"""Rank correlation of predicted and actual losses over retrained models, and how sure it is.

Letters: R retrained models, M queries, N training samples, L dampings, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

# resamples treated at once
_CHUNK = 256


def lds_per_query(scores: Tensor, subsets: Tensor, losses: Tensor) -> Tensor:
    """Rank correlation, over retrained models, of predicted and actual losses of every query.

    The prediction for a model is minus the sum of the scores of the samples it was trained on: a
    positive score says that a sample's presence lowers the query's loss.

    Args:
        scores: ``[M, N]``, query by training sample.
        subsets: ``[R, N]`` bool, which samples each of R models was trained on.
        losses: ``[R, M]`` loss of every query under every model.

    Returns:
        ``[M]`` float64 Spearman correlations in [-1, 1], ties sharing their mean rank; 0 where the
        predictions or the losses of a query are all equal.

    Raises:
        TypeError: ``subsets`` is not bool.
        ValueError: shapes disagree, there are fewer than 2 models, or a value is not finite.

    Source:
        Ilyas et al. 2022 (arXiv:2202.00622), section 4; Park et al. 2023 (arXiv:2303.14186).
    """
    if subsets.dtype != torch.bool:
        raise TypeError(f"subsets must be bool, got {subsets.dtype}")
    if scores.ndim != 2 or subsets.ndim != 2 or losses.ndim != 2:
        raise ValueError("scores, subsets and losses must be matrices")
    (M, N), R = scores.shape, len(subsets)
    if subsets.shape != (R, N) or losses.shape != (R, M):
        raise ValueError(
            f"subsets must be [R, {N}] and losses [R, {M}] for scores {[M, N]}, got "
            f"{list(subsets.shape)} and {list(losses.shape)}"
        )
    if R < 2:
        raise ValueError(f"subsets must be of at least 2 models, got {R}")
    for name, value in (("scores", scores), ("losses", losses)):
        if not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).any(1).nonzero()[0])
            raise ValueError(f"{name} must be finite, got row {row} that is not")
    return spearman(predict_groups(scores, subsets), losses)


def predict_groups(scores: Tensor, subsets: Tensor) -> Tensor:
    """What scores predict for models: minus the sum over the samples each was trained on.

    Args:
        scores: ``[M, N]`` floating.
        subsets: ``[R, N]`` bool.

    Returns:
        ``[R, M]`` float64; only its order within a column means anything.
    """
    return -(subsets.double() @ scores.double().T)


def spearman(predictions: Tensor, losses: Tensor) -> Tensor:
    """Spearman correlation of every column of two matrices.

    Args:
        predictions: ``[R, M]``.
        losses: ``[R, M]``.

    Returns:
        ``[M]`` float64, ties sharing their mean rank; 0 where a column is constant.
    """
    ranks = [
        torch.from_numpy(rankdata(values.double().cpu().numpy(), axis=0))
        for values in (predictions, losses)
    ]
    a, b = (rank - rank.mean(0) for rank in ranks)
    norms = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(norms > 0, (a * b).sum(0) / norms.clamp(min=1e-300), 0.0)


def lds(scores: Tensor, subsets: Tensor, losses: Tensor) -> float:
    """Mean of `lds_per_query` over the queries, a fraction in [-1, 1]."""
    return float(lds_per_query(scores, subsets, losses).mean())


@dataclass(frozen=True)
class DampingChoice:
    """A damping chosen on half of the subset models and judged on the other half.

    Attributes:
        damping: the one with the highest LDS on the first half, λ in units of the Gram.
        held_out_lds: its LDS on the other half: the figure to report.
        in_sample_damping: the one with the highest LDS on all models, as the paper chose it.
        in_sample_lds: that LDS; optimistic, because the evaluation chose its own setting.
    """

    damping: float
    held_out_lds: float
    in_sample_damping: float
    in_sample_lds: float


def choose_damping(
    sweep: Iterable[tuple[float, Tensor]], subsets: Tensor, losses: Tensor, *, seed: int = 0
) -> DampingChoice:
    """Choose a damping on a random half of the subset models, report it on the other half.

    Args:
        sweep: (damping, scores ``[M, N]``) pairs; one at a time is held, so a generator over
            `RidgeSolver.iter_sweep` will do.
        subsets: ``[R, N]`` bool, with R at least 4.
        losses: ``[R, M]``.
        seed: of the split.

    Raises:
        ValueError: there is nothing to choose from, fewer than 4 models, or see `lds_per_query`.
    """
    first, second = halves(len(subsets), seed)
    table = [
        (
            damping,
            lds(scores, subsets[first], losses[first]),
            lds(scores, subsets[second], losses[second]),
            lds(scores, subsets, losses),
        )
        for damping, scores in sweep
    ]
    if not table:
        raise ValueError("sweep must hold at least one damping, got none")
    chosen = max(table, key=lambda row: row[1])
    in_sample = max(table, key=lambda row: row[3])
    return DampingChoice(chosen[0], chosen[2], in_sample[0], in_sample[3])


def halves(num_models: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random split of R models: positions of the first half and of the second.

    Raises:
        ValueError: there are fewer than 4 models.
    """
    if num_models < 4:
        raise ValueError(f"subsets must be of at least 4 models to split, got {num_models}")
    order = torch.randperm(num_models, generator=torch.Generator().manual_seed(seed))
    first, second = order.tensor_split(2)
    return first, second


def resample_counts(num_models: int, num_resamples: int, seed: int = 0) -> Tensor:
    """How often each of R models is drawn in each bootstrap resample.

    Returns:
        ``[B, R]`` float32, rows summing to R.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(num_models, (num_resamples, num_models), generator=generator)
    return torch.zeros(num_resamples, num_models).scatter_add_(1, draws, torch.ones(draws.shape))


class ResampledRanks:
    """Mid-ranks of a matrix within every resample, so that they can be correlated with another's.

    A model drawn twice ties with itself and its copies share their mean rank, exactly as if the
    statistic were computed on the resampled rows.

    Args:
        values: ``[R, M]``; only the order within a column matters.
        counts: ``[B, R]`` float32 how often each model is in a resample; zeros leave it out.
    """

    def __init__(self, values: Tensor, counts: Tensor) -> None:
        self.counts = counts
        # below[r, i, m]: 1 where model r ranks below model i for query m, 1/2 where they tie
        columns = values.T
        below = (columns[:, :, None] < columns[:, None, :]).float()
        self._below = below + 0.5 * (columns[:, :, None] == columns[:, None, :]).float()

    def chunks(self) -> Iterator[Tensor]:
        """``[B', R, M]``: mid-ranks less their mean, a chunk of resamples at a time."""
        for counts in self.counts.split(_CHUNK):
            ranks = torch.einsum("br,mri->bim", counts, self._below)
            yield ranks - counts.sum(1)[:, None, None] / 2


def bootstrap_spearman(predictions: Tensor, losses: Sequence[Tensor], counts: Tensor) -> Tensor:
    """The mean over queries of the Spearman correlation in every resample.

    Args:
        predictions: ``[R, M]``; only the order within a column matters.
        losses: chunks of the centred mid-ranks of the losses, `ResampledRanks.chunks`.
        counts: ``[B, R]`` float32, the resamples those are of.

    Returns:
        ``[B]`` float64.
    """
    values = []
    chunks = zip(
        ResampledRanks(predictions, counts).chunks(), losses, counts.split(_CHUNK), strict=True
    )
    for a, b, weights in chunks:
        w = weights[:, :, None]
        weighted = w * b
        norms = ((w * a * a).sum(1) * (weighted * b).sum(1)).double().sqrt()
        correlations = (weighted * a).sum(1).double() / norms.clamp(min=1e-300)
        values.append(torch.where(norms > 0, correlations, 0.0).mean(1))
    return torch.cat(values)


@dataclass(frozen=True)
class Interval:
    """Two confidence intervals of one statistic.

    Attributes:
        percentile: (low, high), quantiles of the resampled statistic.
        bca: (low, high), the same corrected for bias and skewness.
    """

    percentile: tuple[float, float]
    bca: tuple[float, float]


def confidence_interval(
    estimate: float, resampled: Tensor, jackknifed: Tensor, level: float = 0.95
) -> Interval:
    """Percentile and BCa intervals.

    A resample holds copies, whose ties pull a rank correlation towards zero by about as much as a
    finite number of models does: the resampled statistic lies below the estimate as the estimate
    lies below what infinitely many models would give. The percentile interval is shifted down by
    it; BCa puts that right, and is the one to report.

    Args:
        estimate: the statistic of the sample.
        resampled: ``[B]`` of the resamples.
        jackknifed: ``[R]`` of the sample without each of its models.
        level: of confidence.

    Source:
        Efron 1987 (JASA 82, 171).
    """
    values = resampled.double().numpy()
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    below = float(np.mean(values < estimate) + np.mean(values == estimate) / 2)
    # an estimate outside of all resamples would have an infinite bias
    limit = 1 / (2 * len(values))
    bias = norm.ppf(min(max(below, limit), 1 - limit))
    deviations = float(jackknifed.mean()) - jackknifed.double().numpy()
    spread = float((deviations**2).sum())
    acceleration = (deviations**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = bias + norm.ppf(tails)
    corrected = norm.cdf(bias + shifted / (1 - acceleration * shifted))
    percentile, bca = (np.quantile(values, quantiles) for quantiles in (tails, corrected))
    return Interval(_pair(percentile), _pair(bca))


def _pair(values: Any) -> tuple[float, float]:
    return float(values[0]), float(values[1])
