"""Which queries are drawn again and what random removal takes: the published draws, or our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...methods.baselines import random_scores
from ...runs.choices import check_choice, check_seed
from ...runs.files import picture_name
from ...training.presets import get_preset
from .options import (
    DEFAULT_QUERIES,
    DEFAULT_SEED,
    DRAWS,
    PUBLISHED_POOL,
    PUBLISHED_QUERIES,
    PUBLISHED_SEEDS,
    CounterfactualError,
)

_PUBLISHED_RANDOM_SEED = 42


@dataclass(frozen=True)
class Draw:
    """A draw of queries and of random removals.

    Attributes:
        preset: whose published draw it is; None for one of our own.
        seed: of both, where the draw is our own.
    """

    preset: str | None = None
    seed: int = DEFAULT_SEED

    @property
    def description(self) -> str:
        """What decided it, in words."""
        if self.preset is None:
            return f"seed {self.seed}"
        return (
            f"published: random_state {PUBLISHED_SEEDS[self.preset]} for queries, seed "
            f"{_PUBLISHED_RANDOM_SEED} for random removals"
        )

    def choose_queries(self, total: int, count: int | None = None) -> list[int]:
        """Draw queries of a run at random; more of them are those before and others.

        Args:
            total: M, the run's queries; for a published draw at least 1,000.
            count: Q, at most M, or at most the published 60; None takes those 60, or 10 of our
                own, or all there are.

        Returns:
            Q positions.

        Raises:
            ValueError: ``count`` is out of range.

        Source:
            ``train_test_split(range(1000), test_size=60)`` in D-TRAK's
            methods/04_if/get_indices_gen.ipynb at e2a0c2e.
        """
        if self.preset is None:
            count = min(DEFAULT_QUERIES, total) if count is None else count
            if not 1 <= count <= total:
                raise ValueError(
                    f"--num-queries must be in [1, {total}], the run's queries, got {count}"
                )
            generator = torch.Generator().manual_seed(self.seed)
            own: list[int] = torch.randperm(total, generator=generator).tolist()
            return own[:count]
        count = PUBLISHED_QUERIES if count is None else count
        if not 1 <= count <= PUBLISHED_QUERIES:
            raise ValueError(
                f"--num-queries must be in [1, {PUBLISHED_QUERIES}] of the published draw, got "
                f"{count}: --draw seed draws from all {total:,}"
            )
        from sklearn.model_selection import train_test_split

        seed = PUBLISHED_SEEDS[self.preset]
        _, chosen = train_test_split(
            range(PUBLISHED_POOL), test_size=PUBLISHED_QUERIES, random_state=seed
        )
        return [int(position) for position in chosen[:count]]

    def random_scores(self, M: int, N: int) -> Tensor:
        """Scores of random removal.

        Args:
            M: queries of the run.
            N: training images.

        Returns:
            ``[M, N]``, uniform in [0, 1); float64 for a published draw, whose order float32 would
            not keep.

        Source:
            D-TRAK's methods/04_if/get_indices_gen.ipynb at e2a0c2e.
        """
        if self.preset is None:
            return random_scores(M, N, self.seed)
        return torch.from_numpy(np.random.RandomState(_PUBLISHED_RANDOM_SEED).uniform(size=(M, N)))


def choose_draw(
    name: str | None, seed: int | None, preset: str | None, query_ids: Sequence[str], num_train: int
) -> Draw:
    """What ``--draw`` and ``--seed`` ask for.

    Args:
        name: of `DRAWS`; None takes the published draw where there is one for this run and no seed
            is given.
        seed: of a draw of our own; None is `DEFAULT_SEED`.
        preset: whose experiment the run is, as far as is known.
        query_ids: of the run; the picture of seed 3 is called ``00003.png``.
        num_train: N.

    Raises:
        CounterfactualError: the published draw is asked for, and there is none of this preset or
            not for these images.
        ValueError: the name is unknown, the seed is out of range, or one is given with the
            published draw.
    """
    if seed is not None:
        check_seed("--seed", seed)
    own = Draw(seed=DEFAULT_SEED if seed is None else seed)
    if name is not None:
        check_choice("--draw", name, DRAWS)
    if name == "seed" or (name is None and seed is not None):
        return own
    obstacle = _obstacle(preset, query_ids, num_train)
    if name is None:
        return own if obstacle else Draw(preset)
    if seed is not None:
        raise ValueError(f"--seed is for --draw seed, got {seed} with --draw published")
    if obstacle:
        raise CounterfactualError(f"--draw published {obstacle}: --draw seed draws others")
    return Draw(preset)


def _obstacle(preset: str | None, query_ids: Sequence[str], num_train: int) -> str | None:
    """Why the published draw is not for these images; None where it is."""
    if preset not in PUBLISHED_SEEDS:
        given = f"preset {preset!r}" if preset else "a run whose preset is not known (--preset)"
        return f"must be for one of {', '.join(PUBLISHED_SEEDS)}, got {given}"
    names = [picture_name(seed) for seed in range(PUBLISHED_POOL)]
    if list(query_ids[:PUBLISHED_POOL]) != names:
        return (
            f"needs the {PUBLISHED_POOL:,} pictures of seeds 0 to {PUBLISHED_POOL - 1} as queries "
            f"of the run (dtrak.attribute --num-queries {PUBLISHED_POOL}), got {len(query_ids):,}"
        )
    size = get_preset(preset).train.size
    if num_train != size:
        return f"needs the {size:,} training images of {preset}, got {num_train:,}"
    return None
