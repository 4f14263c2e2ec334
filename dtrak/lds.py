"""Linear datamodelling score: do scores predict what models trained on subsets of the data do?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor


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
    predictions = -(subsets.double() @ scores.double().T)
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
    if len(subsets) < 4:
        raise ValueError(f"subsets must be of at least 4 models to split, got {len(subsets)}")
    order = torch.randperm(len(subsets), generator=torch.Generator().manual_seed(seed))
    first, second = order.tensor_split(2)
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
