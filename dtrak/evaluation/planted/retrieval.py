"""How well scores find what was planted.

Letters: Q queries, N training images, P of them planted, k of the highest scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES, CONFIDENCE = 9_999, 0.95
# of the highest scores: how many of the first are looked at
FIRST = 10


@dataclass(frozen=True)
class Found:
    """What a method found for queries of one kind.

    Attributes:
        method: its name.
        variant: its name with what differs from its own settings, as `ExplainOptions.variant`.
        whitening: kind of the whitening, ``"none"`` for none.
        queries: their kind.
        average_precision: of each query.
        precision: of each query, the share of planted images among its `FIRST` highest scores.
        recall: of each query, the share of planted images that are among its P highest scores.
    """

    method: str
    variant: str
    whitening: str
    queries: str
    average_precision: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Found:
        """What `to_dict` gave; raises TypeError for something else."""
        given: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in values.items()}
        return cls(**given)


def average_precisions(scores: Tensor, relevant: Tensor) -> Tensor:
    """The mean, over relevant images, of the precision where each is met going down the scores.

    Args:
        scores: ``[Q, N]``, highest first; of equal ones those that are not relevant come first.
        relevant: ``[N]`` bool, at least one.

    Returns:
        ``[Q]`` float64 in (0, 1].
    """
    hits = _hits(scores, relevant)
    places = torch.arange(1, scores.shape[1] + 1, dtype=torch.float64)
    return (hits * hits.cumsum(1) / places).sum(1) / int(relevant.sum())


def precisions(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """The share of relevant images among the k highest scores, ``[Q]`` float64; as above."""
    return _hits(scores, relevant)[:, :k].mean(1)


def recalls(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """The share of all relevant images that are among the k highest scores; as above."""
    return _hits(scores, relevant)[:, :k].sum(1) / int(relevant.sum())


def _hits(scores: Tensor, relevant: Tensor) -> Tensor:
    """Whether the images going down the scores are relevant, ``[Q, N]`` float64.

    Raises:
        ValueError: a score is not finite, the shapes disagree, or nothing is relevant.
    """
    if scores.ndim != 2 or relevant.shape != scores.shape[1:] or not bool(relevant.any()):
        raise ValueError(
            f"scores and relevant must be [Q, N] and [N] with one that is, got "
            f"{list(scores.shape)}, {list(relevant.shape)} and {int(relevant.sum())} that are"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite, got NaN or infinity")
    # an order that is no help: what is equal is found last
    first = torch.cat([(~relevant).nonzero(), relevant.nonzero()]).flatten()
    order = scores[:, first].argsort(dim=1, descending=True, stable=True)
    return relevant[first][order].double()


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean, and its 95 % percentile bootstrap interval over queries.

    Args:
        values: of Q queries, at least one.
        seed: of the resampling.

    Source:
        Efron and Tibshirani 1993, chapter 13.
    """
    given = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(given, (RESAMPLES, len(given))).mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return float(given.mean()), float(low), float(high)
