"""What is planted, and what is asked for: images of a concept that the data does not have.

Letters: N training images, P of them planted, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...data.samples import Samples, join
from ...data.walk import DataError
from ...models.denoiser import Denoiser
from ...training.data import DataSource
from ..subject import Subject
from .options import CONCEPTS, INVERTED, PlantedError

# pixels compared at a time
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Planted:
    """A training set with foreign images in it.

    Attributes:
        train: N training images, the P planted ones last.
        is_planted: ``[N]`` bool.
        held_out: Q images of the concept that are not planted.
        others: all images of the concept that are not planted.
    """

    train: Samples
    is_planted: Tensor
    held_out: Samples
    others: Samples


def load_concept(
    concept: str, labels: Sequence[int] | None, subject: Subject, model: Denoiser, data: Samples
) -> Samples:
    """The images of a concept, none of which is a training image.

    Args:
        concept: one of `CONCEPTS`, or where foreign images lie.
        labels: only foreign images of these classes; None takes all.
        subject: whose held-out images are inverted or rotated.
        model: says what goes with each.
        data: the training images.

    Raises:
        PlantedError: there are no held-out images, none with these labels, or of another shape.
        FileNotFoundError, ValueError: as `DataSource.load`.
    """
    if concept in CONCEPTS:
        if subject.validation is None:
            raise PlantedError(
                f"--concept {concept} must have held-out images of the data, got none: name a "
                "folder of foreign images"
            )
        found = subject.validation.load(model, subject.split).without(data)
        images = found.images.neg() if concept == INVERTED else found.images.rot90(1, (-2, -1))
    else:
        source = DataSource(concept, resolution=int(data.shape[-1]), resize=True)
        try:
            found = source.load(model)
        except DataError as error:
            raise PlantedError(f"--concept must be {' or '.join(CONCEPTS)}, or: {error}") from error
        if labels is not None:
            if found.labels is None:
                raise PlantedError(f"--labels must be those of {concept}, whose images have none")
            found = found.select([i for i, label in enumerate(found.labels) if label in labels])
        found = found.without(data)
        images = found.images if len(found) else torch.empty(0, *data.shape)
    if images.shape[1:] != data.shape:
        raise PlantedError(
            f"--concept must be images {list(data.shape)}, as the training images, got "
            f"{list(images.shape[1:])}"
        )
    # names decide the noise, and must hold wherever the images lie
    short = concept if concept in CONCEPTS else Path(concept).name
    names = [f"{short}/{name}" for name in found.ids]
    return Samples(images, names, None, short, found.conditions)


def plant(data: Samples, concept: Samples, planted: int, num_queries: int, seed: int) -> Planted:
    """Put images of a concept into a training set.

    Args:
        data: the training images.
        concept: images that are none of them.
        planted: P.
        num_queries: Q, at most.
        seed: of the draw.

    Raises:
        PlantedError: there are no more than P images of the concept.
    """
    if len(concept) <= planted:
        raise PlantedError(
            f"--planted must be below the number of images of the concept, {len(concept):,}, so "
            f"that some are held out, got {planted}"
        )
    order = torch.randperm(len(concept), generator=torch.Generator().manual_seed(seed))
    inside, others = concept.select(order[:planted]), concept.select(order[planted:])
    train = join([data, inside], f"{data.source} and {planted} of {concept.source}")
    is_planted = torch.arange(len(train)) >= len(data)
    return Planted(train, is_planted, others.select(range(len(others))[:num_queries]), others)


def is_of_concept(pictures: Samples, planted: Planted) -> Tensor:
    """Which pictures look more like held-out images of the concept than like the data.

    By the nearest image in L2 of pixels, among all training images that are not planted and all
    images of the concept that are not planted: whom a method ranks highest plays no part.

    Returns:
        ``[len(pictures)]`` bool.
    """
    native = planted.train.select(~planted.is_planted)
    near = [_nearest(pictures, side) for side in (planted.others, native)]
    return near[0] < near[1]


def _nearest(pictures: Samples, side: Samples) -> Tensor:
    """Distance of each picture to the nearest image of a side."""
    rows = pictures.images.flatten(1)
    best = torch.full((len(rows),), torch.inf)
    for first in range(0, len(side), _ROWS):
        others = side.pictures(slice(first, first + _ROWS)).flatten(1)
        best = torch.minimum(best, torch.cdist(rows, others).amin(1))
    return best
