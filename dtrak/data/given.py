"""Samples of whatever a notebook holds: a path, pictures, a tensor, a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .captions import caption_all, check_texts, read_captions
from .images import DataError, decode_records, from_uint8, load_data
from .rows import Rows
from .samples import Samples
from .sources import Record, dataset_records

# no pixel in [-1, 1] is that far off, and those of 0 to 255 are
_BRIGHT = 8
_KINDS = (
    "a folder, file or name of a data set, PIL images, a tensor [N, C, H, W], or a Dataset of x or "
    "(x, label)"
)


def images(
    source: Any,
    labels: Sequence[int] | None = None,
    captions: Sequence[str] | str | None = None,
    ids: Sequence[str] | None = None,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | None = None,
    split: str = "train",
    limit: int | None = None,
    resize: bool = False,
    skip_corrupt: bool = False,
) -> Samples:
    """Images to attribute, or to explain.

    Pixels are read when they are needed; a `Dataset` must give the same ones each time.

    Args:
        source: a folder of images, an image or another source of `load_data`; PIL images; a tensor
            ``[N, C, H, W]``, float in [-1, 1] or uint8; a ``datasets.Dataset``; or anything with a
            length whose items are pictures or tensors, or pairs of one and a label, as a torch
            ``Dataset``.
        labels: N class numbers in the place of the source's own.
        captions: N texts in the place of the source's own; or one for all, in which ``{label}`` is
            the name of an image's class.
        ids: N names in the place of the source's own, which are paths; row numbers where there are
            none.
        channels: 1 or 3; None takes the first image's. Tensors are taken as they are, like size.
        size: side in pixels or (height, width); None takes the first image's.
        split: as in `load_data`.
        limit: as in `load_data`.
        resize: as in `load_data`.
        skip_corrupt: as in `load_data`.

    Raises:
        FileNotFoundError: ``source`` is a path and nothing is there.
        ValueError: it is nothing of the above, or not as many labels, captions or ids as images.
        DataError: as in `load_data`.
    """
    how: dict[str, Any] = {
        "channels": channels,
        "size": size,
        "limit": limit,
        "resize": resize,
        "skip_corrupt": skip_corrupt,
    }
    if isinstance(source, Samples):
        found, name = source, source.source
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        found = load_data(name, split=split, **how)
    else:
        name, found = "images", _collect(source, how)
    if labels is not None or ids is not None:
        before = found
        found = Samples(
            found.pixels,
            found.ids if ids is None else _names(ids),
            found.labels if labels is None else [int(label) for label in labels],
            found.source,
            found.conditions,
        )
        found.tables, found.taken, found.left_out = before.tables, before.taken, before.left_out
    if isinstance(captions, str):
        return found.conditioned(caption_all(captions, name, found))
    if captions is not None:
        given = found.conditioned(list(captions))
        check_texts(captions, found.ids)
        return given
    if isinstance(source, str | os.PathLike):
        own = read_captions(name, found)
        return found if own is None else found.conditioned(own)
    return found


def _names(ids: Sequence[str]) -> list[str]:
    names = [str(name) for name in ids]
    if len(set(names)) < len(names):
        raise ValueError("ids must be different, got some twice: noise goes by them")
    return names


def _collect(source: Any, how: dict[str, Any]) -> Samples:
    """Samples of what is no path."""
    if isinstance(source, Image.Image):
        source = [source]
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(source)
    if isinstance(source, Tensor):
        return _of_tensor(source[: how["limit"]])
    if hasattr(source, "features") and hasattr(source, "cast_column"):
        return decode_records(dataset_records(source, "dataset", None), "dataset", **how)
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(f"images must be {_KINDS}, got a {type(source).__name__}")
    if not len(source):
        raise DataError("images must be at least one, got none")
    first, _ = _split(source[0])
    _refuse_changes(source)
    if isinstance(first, Image.Image):
        return decode_records(_picture_records(source), "images", **how)
    if isinstance(first, Tensor):
        return _of_items(source, how["limit"])
    raise ValueError(f"images must be {_KINDS}, got items that are a {type(first).__name__}")


def _refuse_changes(source: Any) -> None:
    """Refuse a data set that gives other pixels each time; the first, the middle and the last."""
    for row in sorted({0, len(source) // 2, len(source) - 1}):
        one, two = (np.asarray(_split(source[row])[0]) for _ in range(2))
        if one.shape != two.shape or not np.array_equal(one, two):
            raise DataError(
                "images must be the same each time they are asked for, got a data set that changes "
                f"them (at {row}): leave out its random transforms"
            )


def _of_tensor(tensor: Tensor) -> Samples:
    if tensor.ndim < 2 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise ValueError(
            "images must be [N, C, H, W], uint8 or floating in [-1, 1], got "
            f"{list(tensor.shape)} {tensor.dtype}"
        )
    pixels = _floating(tensor.detach().cpu())
    is_picture = pixels.ndim == 4 and pixels.shape[1] in (1, 3) and len(pixels)
    if is_picture and float(pixels.min()) >= 0 and float(pixels.max()) > _BRIGHT:
        raise ValueError(
            "images must be floating in [-1, 1] or uint8, got floating values up to "
            f"{float(pixels.max()):g}: divide by 127.5 and subtract 1"
        )
    return Samples(pixels, [str(row) for row in range(len(pixels))], None, "a tensor")


def _floating(pixels: Tensor) -> Tensor:
    return from_uint8(pixels) if pixels.dtype == torch.uint8 else pixels.float()


def _split(item: Any) -> tuple[Any, int | None]:
    """An item of a data set as (picture, label)."""
    if isinstance(item, tuple | list):
        picture, label = item[0], item[1] if len(item) > 1 else None
        try:
            return picture, None if label is None else int(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"labels must be whole numbers, got {str(label)[:40]!r}: give them as labels=[…]"
            ) from error
    return item, None


def _picture_records(source: Any) -> Iterable[Record]:
    for row in range(len(source)):
        picture, label = _split(source[row])
        yield Record(str(row), label, picture, partial(_read_picture, source, row))


def _read_picture(source: Any, row: int) -> Any:
    return _split(source[row])[0]


class _Items(Rows):
    """The rows of a data set of tensors, asked for as they are needed."""

    def __init__(self, source: Any, count: int) -> None:
        self.source = source
        self.shape = (count, *_split(source[0])[0].shape)

    def read(self, positions: Sequence[int]) -> Tensor:
        """See `Rows.read`."""
        rows = [
            _floating(_split(self.source[position])[0].detach().cpu()) for position in positions
        ]
        for position, row in zip(positions, rows, strict=True):
            if tuple(row.shape) != self.shape[1:]:
                raise DataError(
                    f"images must all be {list(self.shape[1:])} as the first, got "
                    f"{list(row.shape)} at {position}"
                )
        return torch.stack(rows) if rows else torch.empty(0, *self.shape[1:])


def _of_items(source: Any, limit: int | None) -> Samples:
    count = len(source) if limit is None else min(limit, len(source))
    labels = [_split(source[row])[1] for row in range(count)]
    known = [label for label in labels if label is not None]
    return Samples(
        _Items(source, count),
        [str(row) for row in range(count)],
        known if len(known) == count else None,
        f"a {type(source).__name__}",
    )
