"""What is known about scores beside them, made of what they were made of: `Findings`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data.samples import Samples
from ..features.halves import Columns
from ..features.store import Store
from ..findings import Findings
from .errors import ScoreNoise, repeated_rows
from .evidence import Evidence, Scored
from .groups import score_groups
from .scores import gradient_cosine
from .similarity import pixel_cosine
from .verdicts import describe, discoveries, p_values

# held-out images whose features are in memory at once
_ROWS = 512


def judge(
    known: Evidence,
    scores: Tensor,
    held_out: Samples | None = None,
    groups: Sequence[str | None] | None = None,
) -> Findings | None:
    """What was asked for; None for nothing.

    Args:
        known: whose `Evidence.scores` these are.
        scores: ``[M, N]`` float32.
        held_out: images that the model was not trained on, as the training images are given to it.
        groups: N names, as of `group_names`.

    Raises:
        ValueError: as `ScoreNoise.measure` and `p_values`.
    """
    how = known.how
    if not (how.noise_halves or how.look_alikes or held_out is not None or groups is not None):
        return None
    scores = scores.cpu()
    noise = errors = None
    if how.noise_halves:
        repeats = Columns(known.repeated_features(repeated_rows(len(known.train))), 0).load()
        with known.stages.stage("errors of scores"):
            noise = _noise(known.scored, repeats)
            errors = noise.errors().cpu()
    p = found = alike = agreement = None
    if held_out is not None:
        null = _null(known, held_out)
        with known.stages.stage("what stands out"):
            p = p_values(scores, null.cpu())
            found = discoveries(p)
    likeness = ""
    if how.look_alikes:
        alike, likeness = _look_alikes(known, min(how.look_alikes, len(known.train)))
        best = scores.topk(alike.shape[1], dim=1).indices
        agreement = (alike[:, :, None] == best[:, None]).any(2).float().mean(1)
    count = 0 if held_out is None else len(held_out)
    is_judged = errors is not None or found is not None
    return Findings(
        errors,
        p,
        found,
        describe(scores, errors, found, count) if is_judged else None,
        alike,
        likeness,
        None if groups is None else score_groups(scores, groups, noise),
        None if noise is None else noise.reliabilities(scores).cpu(),
        agreement,
        count,
    )


def _noise(scored: Scored | None, repeats: Tensor) -> ScoreNoise:
    assert scored is not None
    assert scored.solver is not None
    assert scored.query_noise is not None
    return ScoreNoise.measure(
        scored.solver,
        scored.queries,
        scored.query_noise,
        Columns(scored.train, 0),
        Columns(scored.train, 1),
        repeats,
        scored.damping,
    )


def _null(known: Evidence, held_out: Samples) -> Tensor:
    """What queries give to held-out images, ``[M, H]``."""
    method, scored = known.how.what, known.scored
    if scored is None:
        return method.score(known.queries, held_out)
    features = known.held_out_features(held_out)
    if scored.solver is None:
        return method.score(scored.queries, features)
    if known.how.noise_halves:
        return _as_if_added(scored, Columns(features, 0))
    return _as_if_added(scored, features)


def _as_if_added(scored: Scored, features: Store | Columns) -> Tensor:
    """Scores of images as if each had been among the training features, ``[M, H]``.

    A training image's features are part of the Gram, which lowers its score by 1 - h; another
    image's score is lowered as much: ``ψᵀ(ΦᵀΦ + φφᵀ + λI)⁻¹φ = ψᵀAφ / (1 + φᵀAφ)``.
    """
    assert scored.solver is not None
    along = scored.solver.inverse_times(scored.queries, scored.damping)
    parts = []
    for first in range(0, len(features), _ROWS):
        rows = features[first : first + _ROWS].double()
        own = (scored.solver.inverse_times(rows, scored.damping) * rows).sum(1)
        parts.append(along @ rows.T / (1 + own))
    return torch.cat(parts, dim=1).float()


def _look_alikes(known: Evidence, count: int) -> tuple[Tensor, str]:
    """Columns of the training images most like each query ``[M, count]``, and by what."""
    if known.dino is not None:
        alike, by = gradient_cosine(*_dino_embeddings(known, known.dino)), "DINO"
    elif known.clip is not None:
        alike, by = gradient_cosine(*known.embeddings()), "CLIP"
    else:
        with known.stages.stage("look-alikes"):
            alike, by = pixel_cosine(known.queries, known.train), "pixels"
    return alike.topk(count, dim=1).indices, by


def _dino_embeddings(known: Evidence, folder: str | Path) -> tuple[Tensor, Tensor]:
    """Of the queries and of the training images."""
    from .baselines import dino_embeddings, load_dino

    model = load_dino(folder, known.device)
    with known.stages.stage("DINO embeddings") as progress:
        train = dino_embeddings(known.train, model, progress=progress)
        return dino_embeddings(known.queries, model), train
