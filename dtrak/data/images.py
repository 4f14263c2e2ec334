"""Images to attribute: embedded digits, image folders, parquet files, Hugging Face data sets.

Every source goes through the same decoding, so one image has the same pixels, and one data set the
same fingerprint, however it is stored.
"""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..runs.choices import counted
from ..runs.files import expand_path, picture_name, write_atomically
from .rows import KEPT_BYTES, Decoded, from_uint8
from .samples import Samples, hash_pixels
from .sources import (
    DataError,
    Record,
    digits,
    digits_positions,
    digits_split,
    find_records,
    first_line,
    missing_path,
)

__all__ = [
    "DataError",
    "decode_records",
    "digits_split",
    "encode_png",
    "from_uint8",
    "load_data",
    "save_images",
    "to_uint8",
]

DIGITS_SIZE = 8


def load_data(
    source: str | os.PathLike[str],
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | None = None,
    split: str = "train",
    limit: int | None = None,
    labels: Sequence[int] | None = None,
    skip_corrupt: bool = False,
    resize: bool = False,
) -> Samples:
    """Load images as a model with ``channels`` and ``size`` takes them.

    Grey images become RGB by repetition, RGB becomes grey by luma, transparency is laid over white,
    EXIF rotation is applied, and of an animation the first frame counts. Pixels stay uint8 until
    they are asked for: up to half a gigabyte is kept decoded, the rest decoded again when it is
    needed.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8 x 8; splits ``train``,
            ``validation`` and ``all``); a folder of images (searched recursively, in the order of
            their paths, hidden ones left out; of folders ``train`` and ``validation`` or ``test``
            beside each other only that of ``split``; labelled by folders ``<class>/<image>``); a
            parquet file with a column ``image`` or ``img`` of {bytes, path} and
            optionally an integer column ``label``, or a folder with one such file for each part,
            ``…-train.parquet`` and ``…-test.parquet``; a folder written by
            ``Dataset.save_to_disk``; CIFAR-10's, CelebA's or ArtBench-10's own files (see
            `dtrak.data.layouts`); or a name for ``datasets.load_dataset``.
        channels: 1 (grey) or 3 (RGB); None takes the first image's.
        size: pixels, side or (height, width); None takes the first image's.
        split: which part of a source that has parts; an image and a parquet file have only
            ``train``. Where no part is called ``validation``, that is one called ``valid``,
            ``val`` or ``test``.
        limit: keep at most this many images, the first ones; None keeps all.
        labels: keep only images of these classes; None keeps all.
        skip_corrupt: leave out images that do not decode, with one warning, instead of raising.
        resize: bring an image of another size to ``size``: shortest side to size (bilinear), then
            centre crop.

    Raises:
        FileNotFoundError: if ``source`` is a path and nothing is there.
        ValueError: if channels, size, limit or split is out of range.
        DataError: if there are no images, an image is corrupt, has pixels that are not 8-bit or
            another size than the model's, the parquet file is unreadable or has no image column,
            labels are asked for and there are none, or a hub name cannot be loaded.

    Source:
        Resizing and normalisation as in D-TRAK's ``train_unconditional.py``
        (github.com/sail-sg/D-TRAK at e2a0c2e).
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    shape = (size, size) if isinstance(size, int) else size
    if shape is not None and min(shape) < 1:
        raise ValueError(f"size must be positive, got {size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    name = os.fspath(source)
    if isinstance(source, os.PathLike) and not expand_path(source).exists():
        raise missing_path(name)
    if name == "digits" and shape in (None, (DIGITS_SIZE, DIGITS_SIZE)):
        return _load_digits(channels or 1, split, limit, labels)
    found = find_records(name, split)
    records = found.records if labels is None else _with_labels(found.records, set(labels), name)
    samples = decode_records(
        records,
        name,
        channels=channels,
        size=shape,
        limit=limit,
        skip_corrupt=skip_corrupt,
        resize=resize,
        description=_describe(name, split),
    )
    first = f", the first {len(samples):,}" if limit == len(samples) else ""
    samples.taken = (
        f"{counted(len(samples), 'image')} of {name}{f' ({found.taken})' * bool(found.taken)}"
    )
    samples.taken += first
    samples.tables, samples.class_names = found.tables, found.class_names
    if found.left_out:
        # the same line in every place that loads them
        samples.left_out = "; ".join(found.left_out)
        warnings.warn(f"{samples.taken}; left out: {samples.left_out}", stacklevel=2)
    return samples


def decode_records(
    records: Iterable[Record],
    name: str,
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    crop: int | None = None,
    skip_corrupt: bool = False,
    resize: bool = False,
    description: str | None = None,
) -> Samples:
    """Decode records into images, as `load_data` does.

    Args:
        records: what to decode, in order.
        name: of the source, for messages.
        channels: as in `load_data`.
        size: as in `load_data`.
        limit: as in `load_data`.
        crop: cut this many pixels square out of the centre first, of images at least that large:
            a picture that a model drew at the model's size is left whole.
        skip_corrupt: as in `load_data`.
        resize: as in `load_data`.
        description: the source in words; None takes the name.

    Raises:
        DataError: as in `load_data`.
    """
    shape = (size, size) if isinstance(size, int) else size
    decoder = _Decoder(name, channels, shape, crop, resize)
    return _decode_all(records, decoder, description or name, limit, skip_corrupt)


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images [..., C, H, W] from [-1, 1] to uint8, to the nearest level; clips outside.

    Raises:
        ValueError: if a pixel is NaN or infinite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def save_images(images: Tensor, folder: str | os.PathLike[str], prefix: str = "") -> list[Path]:
    """Write images as 8-bit PNG files ``<prefix>00000.png``, ``<prefix>00001.png``, and so on.

    A query is the image as saved: read it back (``load_data(folder)``) before attributing it.

    Args:
        images: [M, C, H, W] in [-1, 1], C 1 or 3.
        folder: made if missing.
        prefix: of every file name.

    Returns:
        The M paths, in order.

    Raises:
        ValueError: if images are not [M, C, H, W] with C 1 or 3, or not finite.

    Source:
        Generated images are re-read from 8-bit PNG files in D-TRAK's ``gen_unconditional.py``
        (github.com/sail-sg/D-TRAK at e2a0c2e).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [M, 1 or 3, H, W], got {list(images.shape)}")
    folder = expand_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, pixels in enumerate(to_uint8(images)):
        path = folder / f"{prefix}{picture_name(index)}"
        write_atomically(path, encode_png(pixels))
        paths.append(path)
    return paths


def encode_png(pixels: Tensor) -> bytes:
    """Encode one image [C, H, W] uint8, C 1 or 3, as a PNG file."""
    array = pixels.movedim(0, -1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="png")
    return buffer.getvalue()


def _describe(name: str, split: str) -> str:
    return name if split == "train" and name != "digits" else f"{name} ({split})"


def _load_digits(
    channels: int, split: str, limit: int | None, labels: Sequence[int] | None
) -> Samples:
    """Load the digits without rounding them to 8 bits: 0..16 is exact in steps of 1/8."""
    pixels, target = digits()
    chosen = digits_positions(split)
    if labels is not None:
        chosen = [position for position in chosen if int(target[position]) in set(labels)]
        if not chosen:
            raise DataError(f"'digits' has no image with a label in {sorted(set(labels))}")
    chosen = chosen[:limit]
    images = torch.from_numpy(pixels[chosen]).float().div_(8).sub_(1)
    return Samples(
        images=images[:, None].repeat(1, channels, 1, 1),
        ids=[f"digits/{position:04d}" for position in chosen],
        labels=[int(target[position]) for position in chosen],
        source=_describe("digits", split),
    )


def _with_labels(records: Iterable[Record], kept: set[int], name: str) -> Iterator[Record]:
    empty = True
    for record in records:
        if record.label is None:
            raise DataError(f"labels were asked for, but '{name}' has none (at '{record.id}')")
        if record.label in kept:
            empty = False
            yield record
    if empty:
        raise DataError(f"'{name}' has no image with a label in {sorted(kept)}")


class _Decoder:
    """Brings records to pixels of one shape; the first one decides what is not given.

    Args:
        name: of the source, for messages.
        channels: as in `load_data`.
        shape: (height, width), or None.
        crop: as in `decode_records`.
        resize: as in `load_data`.
    """

    def __init__(
        self,
        name: str,
        channels: int | None,
        shape: tuple[int, int] | None,
        crop: int | None,
        resize: bool,
    ) -> None:
        self.name, self.channels, self.shape, self.crop = name, channels, shape, crop
        self.resize, self._given, self._first = resize, shape is not None, ""

    def __call__(self, image: Image.Image, name: str) -> np.ndarray:
        """Pixels ``[C, H, W]`` uint8 of a decoded image.

        Raises:
            DataError: it has pixels that are not 8-bit, or another size.
        """
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"image '{name}' in '{self.name}' must have 8-bit pixels, got mode {image.mode}"
            )
        if self.crop is not None and min(image.size) >= self.crop:
            image = _crop_centre(image, self.crop, self.crop)
        self._first = self._first or name
        self.channels = self.channels or (1 if image.mode in ("1", "L", "LA") else 3)
        self.shape = self.shape or (image.height, image.width)
        height, width = self.shape
        image = _flatten(image, self.channels)
        if (image.height, image.width) != self.shape:
            if not self.resize:
                reference = "the model takes" if self._given else f"the first ('{self._first}') is"
                raise DataError(
                    f"image '{name}' in '{self.name}' is {image.width}x{image.height} pixels, "
                    f"{reference} {width}x{height} (--resize resizes and crops)"
                )
            image = _resize(image, height, width)
        return np.asarray(image).reshape(height, width, self.channels).transpose(2, 0, 1)


def _decode_all(
    records: Iterable[Record],
    decoder: _Decoder,
    source: str,
    limit: int | None,
    skip_corrupt: bool,
) -> Samples:
    """Decode every record once, keep the pixels of the first ones, and how to read the others."""
    kept: list[np.ndarray] = []
    later: list[tuple[str, Any]] = []
    size, ids, digests = 0, [], []
    labels: list[int | None] = []
    corrupt: list[str] = []
    for record in records:
        try:
            image = _decode(record.content)
        # Pillow's decoders raise whatever the broken bytes lead them to: OSError, SyntaxError, …
        except Exception as error:
            reason = f"corrupt image '{record.id}' in '{decoder.name}': {first_line(error)}"
            if not skip_corrupt:
                raise DataError(f"{reason} (--skip-corrupt leaves it out)") from error
            corrupt.append(reason)
            continue
        pixels = decoder(image, record.id)
        size += pixels.nbytes
        if size <= KEPT_BYTES:
            kept.append(pixels)
        else:
            later.append((record.id, record.reread or record.content))
        digests.append(hash_pixels(from_uint8(torch.from_numpy(pixels.copy()))))
        ids.append(record.id)
        labels.append(record.label)
        if len(ids) == limit:
            break
    if corrupt:
        if not ids:
            raise DataError(f"all {len(corrupt)} images are corrupt; the first: {corrupt[0]}")
        warnings.warn(
            f"left out {counted(len(corrupt), 'image')}; the first: {corrupt[0]}", stacklevel=4
        )
    known = [label for label in labels if label is not None]

    def decode_again(position: int) -> np.ndarray:
        name, content = later[position - len(kept)]
        try:
            return decoder(_decode(content), name).copy()
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"image '{name}' in '{decoder.name}' could be read before and cannot now: "
                f"{first_line(error)}"
            ) from error

    first = np.stack(kept) if kept else np.empty((0, *pixels.shape), np.uint8)
    return Samples(
        Decoded(first, decode_again, len(ids)),
        ids,
        known if len(known) == len(labels) else None,
        source,
        digests=digests,
    )


def _decode(content: Any) -> Image.Image:
    if callable(content):
        content = content()
    if content is None:
        raise ValueError("it holds no bytes")
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if isinstance(content, Image.Image):
        return ImageOps.exif_transpose(content)
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """Lay transparency over white and convert to grey or RGB."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if channels == 1 else "RGB")


def _resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize until [height, width] just fits inside, bilinear, then crop the centre."""
    if width * image.height >= height * image.width:
        scaled = (width, max(height, int(width * image.height / image.width)))
    else:
        scaled = (max(width, int(height * image.width / image.height)), height)
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    return _crop_centre(image, height, width)


def _crop_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
