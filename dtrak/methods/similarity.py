"""Methods that look at images alone: alike as plain vectors, or chance."""

from __future__ import annotations

from torch import Tensor

from ..data.samples import Samples
from .baselines import random_scores
from .scores import gradient_cosine, gradient_dot


def pixel_dot(queries: Samples, train: Samples) -> Tensor:
    """Inner product of the pixels, in [-1, 1], of each query and training sample; ``[M, N]``."""
    return gradient_dot(_Vectors(queries)[:], _Vectors(train))


def pixel_cosine(queries: Samples, train: Samples) -> Tensor:
    """Cosine of the pixels of each query and training sample; ``[M, N]``."""
    return gradient_cosine(_Vectors(queries)[:], _Vectors(train))


def latent_dot(queries: Samples, train: Samples) -> Tensor:
    """As `pixel_dot`, of what the model is given in the place of pixels.

    Raises:
        ValueError: that is the pixels themselves.
    """
    return gradient_dot(*_latents(queries, train))


def latent_cosine(queries: Samples, train: Samples) -> Tensor:
    """As `pixel_cosine`, of what the model is given in the place of pixels; raises likewise."""
    return gradient_cosine(*_latents(queries, train))


def chance(queries: Samples, train: Samples) -> Tensor:
    """The baseline that knows nothing: ``[M, N]`` independent scores, uniform in [0, 1)."""
    return random_scores(len(queries), len(train), 0)


class _Vectors:
    """Samples as the rows of a matrix, read as they are asked for."""

    def __init__(self, samples: Samples, *, encoded: bool = False) -> None:
        self._read = samples.batch if encoded else samples.pictures
        shape = self._read(slice(0, 1)).shape[1:]
        self.shape = (len(samples), shape.numel())

    def __getitem__(self, rows: slice) -> Tensor:
        return self._read(rows).flatten(1)


def _latents(queries: Samples, train: Samples) -> tuple[Tensor, _Vectors]:
    if not train.is_encoded:
        raise ValueError(
            "--method raw-latents-… must have a model that is given latents, got one that is given "
            "pixels: see raw-pixels-dot and raw-pixels-cosine"
        )
    return _Vectors(queries, encoded=True)[:], _Vectors(train, encoded=True)
