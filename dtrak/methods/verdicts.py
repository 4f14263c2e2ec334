"""What stands out: scores against those that the same query gives to held-out images.

Letters: M queries, N training images, H held-out images, k of the highest held-out scores.

A held-out image is not in the training set, so whatever it scores is what any image like the
training images would. The p-value of a score is how often a held-out image scores as high; above
the (k+1)-th highest of them it is read off a generalised Pareto tail that is fitted to the k above,
averaged over its parameters instead of taking the best ones: with few images the tail is uncertain,
and what is uncertain is no discovery.

Source:
    Conformal p-values and Benjamini-Hochberg: Bates et al. 2023 (arXiv:2104.08279). Tail:
    Pickands 1975 (Annals of Statistics 3, 119).
"""

from __future__ import annotations

import torch
from torch import Tensor

# of false discoveries, and of scores that noise alone puts beyond so many errors
RATE, _CLEAR = 0.05, 1.96
FEWEST = 40
# of held-out images, those of the tail, and no fewer than
_TAIL, _FEWEST_IN_TAIL = 0.1, 20
# shapes, none of them 0, near that of an exponential tail; and scales in mean exceedances
_SHAPES = torch.linspace(-0.5, 0.5, 40, dtype=torch.float64)
_SPREAD = 0.25
_SCALES = torch.logspace(-0.7, 0.7, 41, dtype=torch.float64)


def check_count(num_held_out: int) -> None:
    """Refuse held-out images that are too few for a p-value.

    Raises:
        ValueError: so they are.
    """
    if num_held_out < FEWEST:
        raise ValueError(
            f"--held-out must be at least {FEWEST} images that are no training images or queries, "
            f"got {num_held_out}"
        )


def p_values(scores: Tensor, held_out: Tensor) -> Tensor:
    """One-sided p-values of scores against those of held-out images.

    Args:
        scores: ``[M, N]``.
        held_out: ``[M, H]``, what the same queries give to images the model was not trained on.

    Returns:
        ``[M, N]`` float32 in (0, 1].

    Raises:
        ValueError: H is below `FEWEST`.
    """
    H = held_out.shape[1]
    check_count(H)
    k = max(_FEWEST_IN_TAIL, int(_TAIL * H))
    rows = [_row(s, t, k) for s, t in zip(scores.double(), held_out.double(), strict=True)]
    return torch.stack(rows).float() if rows else scores.float()


def _row(scores: Tensor, held_out: Tensor, k: int) -> Tensor:
    ordered, H = held_out.sort().values, len(held_out)
    found = (1 + H - torch.searchsorted(ordered, scores)).double() / (H + 1)
    start, mean = ordered[-k - 1], (ordered[-k:] - ordered[-k - 1]).mean()
    is_beyond = scores > start
    # all of the highest alike: what is higher is as rare as can be counted
    if mean > 0 and bool(is_beyond.any()):
        tail = _tail((ordered[-k:] - start) / mean, (scores[is_beyond] - start) / mean)
        found[is_beyond] = (k + 1) / (H + 1) * tail
    return found


def _tail(exceedances: Tensor, values: Tensor) -> Tensor:
    """How likely the next exceedance is above each of ``values``; both in mean exceedances."""
    shape, scale = (grid.flatten() for grid in torch.meshgrid(_SHAPES, _SCALES, indexing="ij"))
    log_terms = torch.log1p((shape / scale * exceedances[:, None]).clamp(min=-1)).sum(0)
    # flat over logarithms of scales; impossible tails have a logarithm of -inf
    likelihood = -len(exceedances) * scale.log() - (1 + 1 / shape) * log_terms
    likelihood -= (shape / _SPREAD).square() / 2
    likelihood[torch.isneginf(log_terms)] = -torch.inf
    weights = torch.softmax(likelihood, 0)
    parts = [
        torch.exp(-torch.log1p((shape / scale * part[:, None]).clamp(min=-1)) / shape) @ weights
        for part in values.split(1024)
    ]
    # one that is impossible under every tail is as unlikely as a number can say
    return torch.cat(parts).clamp(min=1e-30)


def discoveries(p: Tensor, rate: float = RATE) -> Tensor:
    """Which p-values of each row are rejected by Benjamini and Hochberg's procedure.

    Args:
        p: ``[M, N]``.
        rate: expected share of false ones among those rejected.

    Returns:
        ``[M, N]`` bool.

    Source:
        Benjamini and Hochberg 1995 (JRSS B 57, 289).
    """
    N = p.shape[1]
    ordered = p.double().sort(1).values
    fits = ordered <= rate * torch.arange(1, N + 1) / N
    # the last that fits, and all before it
    last = (fits * torch.arange(1, N + 1)).amax(1, keepdim=True)
    limit = torch.where(last > 0, ordered.gather(1, (last - 1).clamp(min=0)), -1.0)
    return p.double() <= limit


def count_clear(scores: Tensor, errors: Tensor) -> Tensor:
    """How many scores of each query are larger than 1.96 errors, ``[M]`` int64."""
    return (scores.abs() > _CLEAR * errors).sum(1)


def describe(
    scores: Tensor, errors: Tensor | None, stands_out: Tensor | None, num_held_out: int
) -> tuple[str, ...]:
    """A verdict on each query, of at most two sentences.

    Args:
        scores: ``[M, N]``.
        errors: ``[M, N]`` standard errors; None where they are not known.
        stands_out: ``[M, N]`` bool; None without held-out images.
        num_held_out: H.
    """
    N = scores.shape[1]
    texts = []
    for row in range(len(scores)):
        parts = []
        if errors is not None:
            clear = int(count_clear(scores[row : row + 1], errors[row : row + 1]))
            parts.append(
                f"{clear:,} of {N:,} scores are beyond their noise, where noise alone puts "
                f"{round(RATE * N):,}."
            )
        if stands_out is not None:
            count = int(stands_out[row].sum())
            what = "Nothing stands" if count == 0 else f"{count:,} stand{'s' * (count == 1)}"
            parts.append(f"{what} out against {num_held_out:,} held-out images.")
        texts.append(" ".join(parts))
    return tuple(texts)
