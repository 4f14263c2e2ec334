"""Samples: what is attributed, with names, and what goes with each; read as they are needed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..runs.choices import counted
from .rows import Chosen, InMemory, Joined, Rows

# rows hashed at a time
_HASHED = 64


class Samples:
    """N samples in a fixed order. Pixels are decoded when a batch of them is asked for.

    Letters: N samples, B of a batch. A sample is a picture ``[C, H, W]`` for the models here, and
    may have any dimensions for one of your own.

    Args:
        images: ``[N, ...]`` float32 (pictures in [-1, 1]), a tensor or rows that are read.
        ids: N names that stay the same when the data is moved or reordered.
        labels: N class numbers, or None where the source has none.
        source: where they came from, in words.
        conditions: what the model reads beside each: N captions, or N labels; None for a model that
            reads nothing.
        digests: `hash_pixels` of each, where they are known.

    Attributes:
        ids: as above.
        labels: as above.
        source: as above.
        conditions: as above.
        pixels: the rows themselves.
        inputs: what noise is added to: the pixels, or what `encoded` put in their place.
        taken: how many of what there are, in words.
        left_out: what lies with them and was left out, and why, in words; empty for nothing.
        class_names: of labels, where they are known.
        tables: the file behind each id ``<name of the file>/<row>``, by that name.

    Raises:
        ValueError: if images are not ``[N, ...]`` float32, or the others are not N long.
    """

    def __init__(
        self,
        images: Tensor | Rows,
        ids: Sequence[str],
        labels: Sequence[int] | None,
        source: str,
        conditions: Sequence[Any] | None = None,
        digests: Sequence[bytes] | None = None,
    ) -> None:
        if isinstance(images, Tensor):
            if images.ndim < 2 or images.dtype != torch.float32:
                raise ValueError(
                    f"images must be [N, C, H, W] float32, got {list(images.shape)} {images.dtype}"
                )
            images = InMemory(images)
        for name, values in (("ids", ids), ("labels", labels), ("conditions", conditions)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{name} must be {len(images)} long, got {len(values)}")
        self.pixels: Rows = images
        self.inputs: Rows = images
        self._encoded = False
        self.ids, self.source = list(ids), source
        self.labels = None if labels is None else list(labels)
        self.conditions = None if conditions is None else list(conditions)
        # of pixels alone, shared by all that have the same ones
        self._digests: dict[int, bytes] = dict(enumerate(digests or ()))
        self._fingerprint: str | None = None
        self.taken, self.left_out = f"{counted(len(images), 'image')} of {source}", ""
        self.tables: dict[str, Path] = {}
        self.class_names: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> Tensor:
        """The pixels of one sample, ``[C, H, W]`` for a picture."""
        return self.pixels.read([position])[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, ``(C, H, W)`` for pictures."""
        return self.pixels.shape[1:]

    @property
    def classes(self) -> list[int | str] | None:
        """N names of classes where they are known, numbers where not, None where there are none."""
        if self.labels is None:
            return None
        return [self.class_names.get(label, label) for label in self.labels]

    @property
    def is_encoded(self) -> bool:
        """Whether `inputs` are something else than the pixels."""
        return self._encoded

    @property
    def images(self) -> Tensor:
        """All of them, ``[N, ...]`` float32, in memory at once: for few, or small ones."""
        return self.pixels.read(range(len(self)))

    def pictures(self, rows: slice | Sequence[int]) -> Tensor:
        """Some of them, ``[B, ...]`` float32 in [-1, 1], on the CPU."""
        return self.pixels.read(self._positions(rows))

    def batch(self, rows: slice | Sequence[int]) -> Tensor:
        """What noise is added to for some of them, ``[B, ...]`` float32 on the CPU."""
        return self.inputs.read(self._positions(rows))

    def conditions_of(self, rows: slice | Sequence[int]) -> list[Any] | None:
        """What the model reads beside some of them, or None."""
        if self.conditions is None:
            return None
        return [self.conditions[position] for position in self._positions(rows)]

    def _positions(self, rows: slice | Sequence[int]) -> Sequence[int]:
        return range(len(self))[rows] if isinstance(rows, slice) else rows

    def digests(self) -> list[bytes]:
        """`hash_pixels` of every sample."""
        missing = [position for position in range(len(self)) if position not in self._digests]
        for first in range(0, len(missing), _HASHED):
            part = missing[first : first + _HASHED]
            for position, image in zip(part, self.pixels.read(part), strict=True):
                self._digests[position] = hash_pixels(image)
        return [self._digests[position] for position in range(len(self))]

    def fingerprints(self) -> list[str]:
        """SHA-256 (hexadecimal) of every sample: its id, its pixels, and its condition."""
        conditions = self.conditions or [None] * len(self)
        return [
            _fingerprint(*one) for one in zip(self.ids, self.digests(), conditions, strict=True)
        ]

    def without(self, *others: Samples) -> Self:
        """The samples whose pixels none of ``others`` has."""
        seen = {digest for other in others for digest in other.digests()}
        return self.select([place for place, own in enumerate(self.digests()) if own not in seen])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the samples' own and their shape, in order; made once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(self.pixels.shape).encode())
            for one in self.fingerprints():
                digest.update(one.encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """The samples at ``indices``, in that order (repeats allowed).

        Args:
            indices: positions in [0, N), or a bool mask [N].

        Raises:
            ValueError: if an index lies outside [0, N), or a mask is not N long.
        """
        positions = torch.as_tensor(indices)
        if positions.dtype == torch.bool:
            if positions.shape != (len(self),):
                raise ValueError(f"mask must be [{len(self)}], got {list(positions.shape)}")
            positions = positions.nonzero().flatten()
        chosen = [int(position) for position in positions.tolist()]
        for position in chosen:
            if not 0 <= position < len(self):
                raise ValueError(f"indices must lie in [0, {len(self)}), got {position}")
        other = copy.copy(self)
        other.pixels = Chosen(self.pixels, chosen)
        other.inputs = Chosen(self.inputs, chosen) if self.is_encoded else other.pixels
        other.ids = [self.ids[p] for p in chosen]
        other.labels = None if self.labels is None else [self.labels[p] for p in chosen]
        other.conditions = self.conditions_of(chosen)
        other._digests = {
            place: self._digests[p] for place, p in enumerate(chosen) if p in self._digests
        }
        other._fingerprint = None
        return other

    def conditioned(self, conditions: Sequence[Any] | None) -> Self:
        """The same samples for a model that reads ``conditions`` beside them, N or none.

        Raises:
            ValueError: they are not N.
        """
        if conditions is not None and len(conditions) != len(self):
            raise ValueError(f"conditions must be {len(self)} long, got {len(conditions)}")
        other = copy.copy(self)
        other.conditions = None if conditions is None else list(conditions)
        other._fingerprint = None
        return other

    def encoded(self, inputs: Rows) -> Self:
        """The same samples for a model that is given ``inputs`` in the place of the pixels.

        Raises:
            ValueError: they are not N.
        """
        if len(inputs) != len(self):
            raise ValueError(f"inputs must be {len(self)} rows, got {len(inputs)}")
        other = copy.copy(self)
        other.inputs, other._encoded = inputs, True
        return other


def as_samples(data: Samples | Tensor) -> Samples:
    """Samples, of which a tensor ``[N, ...]`` float32 gives some that are named by their row."""
    if isinstance(data, Samples):
        return data
    return Samples(data, [str(row) for row in range(len(data))], None, "a tensor")


def join(parts: Sequence[Samples], source: str) -> Samples:
    """Samples of one shape one after the other, without labels.

    Raises:
        ValueError: some have conditions, or other inputs than their pixels, and others none.
    """
    conditions = [part.conditions for part in parts]
    for name, has in (
        ("conditions", [part.conditions is not None for part in parts]),
        ("inputs of their own", [part.is_encoded for part in parts]),
    ):
        if any(has) and not all(has):
            raise ValueError(f"samples must all have {name} to be joined, or none, got {has}")
    whole = Samples(
        Joined([part.pixels for part in parts]),
        [name for part in parts for name in part.ids],
        None,
        source,
        None if None in conditions else [c for part in conditions for c in part or []],
    )
    if any(part.is_encoded for part in parts):
        whole = whole.encoded(Joined([part.inputs for part in parts]))
    return whole


def hash_pixels(image: Tensor) -> bytes:
    """SHA-256 of the float32 values of one sample."""
    values = image.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.tobytes()).digest()


def _fingerprint(name: str, pixels: bytes, condition: Any) -> str:
    encoded = name.encode("utf-8", "surrogateescape")
    # the length in front keeps ("ab", "c") and ("a", "bc") apart
    digest = hashlib.sha256(len(encoded).to_bytes(8, "little") + encoded + pixels)
    if condition is not None:
        try:
            digest.update(json.dumps(condition).encode())
        except TypeError as error:
            raise ValueError(
                f"conditions must be JSON values (str, int, float, list) to be fingerprinted, got "
                f"a {type(condition).__name__} for sample {name!r}"
            ) from error
    return digest.hexdigest()
