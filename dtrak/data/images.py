"""Images to attribute: embedded digits, image folders, parquet files, Hugging Face data sets.

Every source goes through the same decoding, so one image has the same pixels, and one data set the
same fingerprint, however it is stored.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..runs.files import write_atomically
from .sources import (
    DataError,
    Record,
    digits_positions,
    digits_split,
    first_line,
    missing_path,
    open_records,
)

__all__ = [
    "DataError",
    "ImageData",
    "decode_records",
    "digits_split",
    "encode_png",
    "from_uint8",
    "load_data",
    "save_images",
    "to_uint8",
]

DIGITS_SIZE = 8


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with the names, labels and fingerprint that go with them, in a fixed order.

    Attributes:
        images: pixels [N, C, H, W] float32 in [-1, 1], on the CPU.
        ids: N names that stay the same when the data is moved or reordered.
        labels: N class indices, or None where the source has none.
        source: where the images came from, in words.
        fingerprint: sha256 (hexadecimal) over ids and pixels, in order; computed, never passed.

    Raises:
        ValueError: if images are not [N, C, H, W] float32, or ids or labels are not N long.
    """

    images: Tensor
    ids: list[str]
    labels: list[int] | None
    source: str
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise ValueError(
                "images must be [N, C, H, W] float32, "
                f"got {list(self.images.shape)} {self.images.dtype}"
            )
        if len(self.ids) != len(self.images):
            raise ValueError(f"ids must be {len(self.images)} long, got {len(self.ids)}")
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"labels must be {len(self.images)} long, got {len(self.labels)}")
        object.__setattr__(self, "fingerprint", _fingerprint(self.images, self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int] | Tensor) -> "ImageData":
        """Return the images at ``indices``, in that order (repeats allowed).

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
        return ImageData(
            images=self.images[chosen],
            ids=[self.ids[position] for position in chosen],
            labels=None if self.labels is None else [self.labels[p] for p in chosen],
            source=self.source,
        )


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
) -> ImageData:
    """Load images as a model with ``channels`` and ``size`` takes them.

    Grey images become RGB by repetition, RGB becomes grey by luma, transparency is laid over white,
    EXIF rotation is applied, and of an animation the first frame counts. Pixels stay uint8 until
    the last step: the peak is about 6 bytes a pixel and channel, of which 4 remain.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8 x 8; splits ``train``,
            ``validation`` and ``all``); a folder of images (searched recursively, in the order of
            their paths); a parquet file with a column ``image`` or ``img`` of {bytes, path} and
            optionally an integer column ``label``, or a folder with one such file for each part,
            ``…-train.parquet`` and ``…-test.parquet``; a folder written by
            ``Dataset.save_to_disk``; CIFAR-10's, CelebA's or ArtBench-10's own files (see
            `dtrak.data.layouts`); or a name for ``datasets.load_dataset``.
        channels: 1 (grey) or 3 (RGB); None takes the first image's.
        size: pixels, side or (height, width); None takes the first image's.
        split: which part of a source that has parts; a folder of images and a parquet file have
            only ``train``. Where no part is called ``validation``, that is one called ``valid``,
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
    if isinstance(source, os.PathLike) and not Path(source).exists():
        raise missing_path(name)
    if name == "digits" and shape in (None, (DIGITS_SIZE, DIGITS_SIZE)):
        return _load_digits(channels or 1, split, limit, labels)
    records = open_records(name, split)
    if labels is not None:
        records = _with_labels(records, set(labels), name)
    return decode_records(
        records,
        name,
        channels=channels,
        size=shape,
        limit=limit,
        skip_corrupt=skip_corrupt,
        resize=resize,
        description=_describe(name, split),
    )


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
) -> ImageData:
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
    pixels, ids, labels = _decode_all(
        records, name, channels, shape, limit, crop, skip_corrupt, resize
    )
    return ImageData(images=from_uint8(pixels), ids=ids, labels=labels, source=description or name)


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images [..., C, H, W] from [-1, 1] to uint8, to the nearest level; clips outside.

    Raises:
        ValueError: if a pixel is NaN or infinite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def from_uint8(pixels: Tensor) -> Tensor:
    """Bring uint8 pixels to float32 in [-1, 1]; ``to_uint8`` undoes it exactly."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, pixels in enumerate(to_uint8(images)):
        path = folder / f"{prefix}{index:05d}.png"
        write_atomically(path, encode_png(pixels))
        paths.append(path)
    return paths


def encode_png(pixels: Tensor) -> bytes:
    """Encode one image [C, H, W] uint8, C 1 or 3, as a PNG file."""
    array = pixels.movedim(0, -1).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="png")
    return buffer.getvalue()


def _fingerprint(images: Tensor, ids: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    for name, image in zip(ids, images, strict=True):
        encoded = name.encode()
        # the length in front keeps ("ab", "c") and ("a", "bc") apart
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(image.contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _describe(name: str, split: str) -> str:
    return name if split == "train" and name != "digits" else f"{name} ({split})"


def _load_digits(
    channels: int, split: str, limit: int | None, labels: Sequence[int] | None
) -> ImageData:
    """Load the digits without rounding them to 8 bits: 0..16 is exact in steps of 1/8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = digits_positions(split)
    if labels is not None:
        chosen = [position for position in chosen if int(digits.target[position]) in set(labels)]
        if not chosen:
            raise DataError(f"'digits' has no image with a label in {sorted(set(labels))}")
    chosen = chosen[:limit]
    images = torch.from_numpy(digits.images[chosen]).float().div_(8).sub_(1)
    return ImageData(
        images=images[:, None].repeat(1, channels, 1, 1),
        ids=[f"digits/{position:04d}" for position in chosen],
        labels=[int(digits.target[position]) for position in chosen],
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


def _decode_all(
    records: Iterable[Record],
    name: str,
    channels: int | None,
    shape: tuple[int, int] | None,
    limit: int | None,
    crop: int | None,
    skip_corrupt: bool,
    resize: bool,
) -> tuple[Tensor, list[str], list[int] | None]:
    """Decode records to pixels [N, C, H, W] uint8, with their ids and labels."""
    given = shape is not None
    pixels: list[np.ndarray] = []
    ids: list[str] = []
    labels: list[int | None] = []
    corrupt: list[str] = []
    for record in records:
        try:
            image = _decode(record.content)
        # Pillow's decoders raise whatever the broken bytes lead them to: OSError, SyntaxError, …
        except Exception as error:
            reason = f"corrupt image '{record.id}' in '{name}': {first_line(error)}"
            if not skip_corrupt:
                raise DataError(f"{reason} (--skip-corrupt leaves it out)") from error
            corrupt.append(reason)
            continue
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"image '{record.id}' in '{name}' must have 8-bit pixels, got mode {image.mode}"
            )
        if crop is not None and min(image.size) >= crop:
            image = _crop_centre(image, crop, crop)
        channels = channels or (1 if image.mode in ("1", "L", "LA") else 3)
        height, width = shape = shape or (image.height, image.width)
        image = _flatten(image, channels)
        if (image.height, image.width) != shape:
            if not resize:
                reference = "the model takes" if given else f"the first ('{ids[0]}') is"
                raise DataError(
                    f"image '{record.id}' in '{name}' is {image.width}x{image.height} pixels, "
                    f"{reference} {width}x{height} (--resize resizes and crops)"
                )
            image = _resize(image, height, width)
        pixels.append(np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1))
        ids.append(record.id)
        labels.append(record.label)
        if len(ids) == limit:
            break
    if corrupt:
        if not pixels:
            raise DataError(f"all {len(corrupt)} images are corrupt; the first: {corrupt[0]}")
        warnings.warn(f"left out {len(corrupt)} images; the first: {corrupt[0]}", stacklevel=3)
    known = [label for label in labels if label is not None]
    stacked = torch.from_numpy(np.stack(pixels))
    return stacked, ids, known if len(known) == len(labels) else None


def _decode(content: bytes | Path | np.ndarray | None) -> Image.Image:
    if content is None:
        raise ValueError("it holds no bytes")
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
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
