"""The strongest training rows of each query, from scores that may come a block at a time.

    scores [M, N]  ->  the k largest and the k smallest of each row, ties in order of row number

Index legend: M queries, N training rows, B of them in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# values and row numbers, both [M, k]
Best = tuple[Tensor, Tensor]


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
    check_k(k, scores.shape[1])
    return rank_blocks([scores], k)


def rank_blocks(blocks: Iterable[Tensor], k: int, start: int = 0) -> TopK:
    """:func:`top_k` of scores that come as ``[M, B]`` blocks of neighbouring rows, in order.

    Rows are numbered from ``start``; there may be fewer than k of them.
    """
    high: Best | None = None
    low: Best | None = None
    for scores in blocks:
        stop = start + scores.shape[1]
        numbers = torch.arange(start, stop, device=scores.device).expand(scores.shape)
        high = _extend(high, scores, numbers, k, descending=True)
        low = _extend(low, scores, numbers, k, descending=False)
        start = stop
    assert high is not None
    assert low is not None
    return TopK(high[1], high[0], low[1], low[0])


def join_rows(parts: Iterable[TopK], k: int) -> TopK:
    """One :class:`TopK` of those of the same queries over other rows, in order of the rows."""
    high: Best | None = None
    low: Best | None = None
    for part in parts:
        high = _extend(high, part.proponent_scores, part.proponents, k, descending=True)
        low = _extend(low, part.opponent_scores, part.opponents, k, descending=False)
    assert high is not None
    assert low is not None
    return TopK(high[1], high[0], low[1], low[0])


def join_queries(parts: Sequence[TopK]) -> TopK:
    """One :class:`TopK` of those of consecutive queries."""
    return TopK(
        torch.cat([part.proponents for part in parts]),
        torch.cat([part.proponent_scores for part in parts]),
        torch.cat([part.opponents for part in parts]),
        torch.cat([part.opponent_scores for part in parts]),
    )


def check_k(k: int, num_samples: int) -> None:
    """Refuse a ``k`` that is not from 1 to N."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to {num_samples}, got {k}")


def _extend(
    best: Best | None, values: Tensor, numbers: Tensor, k: int, *, descending: bool
) -> Best:
    """``best`` of earlier rows and ``values [M, B]`` of rows ``numbers`` together."""
    found = _keep(values, numbers, k, descending=descending)
    if best is None:
        return found
    # earlier rows first, so that of equal scores they stay first
    values, numbers = (torch.cat(pair, dim=1) for pair in zip(best, found, strict=True))
    return _keep(values, numbers, k, descending=descending)


def _keep(values: Tensor, numbers: Tensor, k: int, *, descending: bool) -> Best:
    """The first ``k`` columns in order of value; stable, so ties keep the order they come in."""
    if values.shape[1] > 8 * k:
        chosen, order = torch.topk(values, k, dim=1, largest=descending)
        last = chosen[:, -1:]
        beyond = values >= last if descending else values <= last
        # the library picks any of several equal values: sort everything where a tie is cut
        if int(beyond.sum()) == chosen.numel():
            order = order.sort(dim=1).values
            values, numbers = values.gather(1, order), numbers.gather(1, order)
    ordered, order = torch.sort(values, dim=1, descending=descending, stable=True)
    return ordered[:, :k].contiguous(), numbers.gather(1, order[:, :k])
