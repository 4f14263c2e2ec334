"""The published data sets as their authors hand them out: CIFAR-10, CelebA and ArtBench-10.

* CIFAR-10: ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, Python pickles or, with the
  suffix ``.bin``, binary files. Images are called ``train/00000``, … in either.
* CelebA: ``list_eval_partition.txt`` (or ``.csv``) beside the aligned pictures, in the folder
  itself, in ``img_align_celeba`` or in ``Img/img_align_celeba``.
* ArtBench-10: ``ArtBench-10.csv`` beside ``artbench-10-imagefolder/<class>/<name>``.
"""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .sources import DataError, Record, class_label, first_line

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
ARTBENCH_CLASSES = (
    "art_nouveau",
    "baroque",
    "expressionism",
    "impressionism",
    "post_impressionism",
    "realism",
    "renaissance",
    "romanticism",
    "surrealism",
    "ukiyo_e",
)
_CIFAR_FOLDERS = (".", "cifar-10-batches-py", "cifar-10-batches-bin")
_CIFAR_PIXELS = 3 * 32 * 32
_CELEBA_LISTS = tuple(
    f"{folder}list_eval_partition.{suffix}"
    for suffix in ("txt", "csv")
    for folder in ("", "Eval/", "eval/")
)
_CELEBA_FOLDERS = (
    "img_align_celeba/img_align_celeba",
    "Img/img_align_celeba",
    "img/img_align_celeba",
    "img_align_celeba",
    "Img",
    "img",
    "images",
    ".",
)
_ARTBENCH_FOLDERS = (
    "artbench-10-imagefolder",
    "data/artbench-10-imagefolder",
    "artbench-10-imagefolder-split/{split}",
    ".",
)


def open_layout(folder: Path, split: str) -> Iterator[Record] | None:
    """Walk a published data set in the order its authors number it, or None if it is not one.

    Args:
        folder: where it lies.
        split: ``"train"``, ``"validation"`` or ``"test"``; CIFAR-10 and ArtBench-10 have no
            validation part, and their test part is taken.

    Raises:
        ValueError: the split is none of these.
        DataError: a file is missing or damaged; the message names it.
    """
    for place in (folder / name for name in _CIFAR_FOLDERS):
        for suffix in ("", ".bin"):
            if (place / f"data_batch_1{suffix}").is_file():
                return _cifar_records(place, suffix, _check_split(folder, split))
    for name in _CELEBA_LISTS:
        if (folder / name).is_file():
            return _celeba_records(folder, folder / name, _check_split(folder, split))
    table = folder / "ArtBench-10.csv"
    if table.is_file():
        return _artbench_records(folder, table, _check_split(folder, split))
    return None


def _check_split(folder: Path, split: str) -> str:
    if split not in ("train", "validation", "test"):
        raise ValueError(
            f"split of '{folder}' must be one of train, validation, test, got '{split}'"
        )
    return split


def _cifar_records(folder: Path, suffix: str, split: str) -> Iterator[Record]:
    training = split == "train"
    names = [f"data_batch_{number}" for number in range(1, 6)] if training else ["test_batch"]
    row = 0
    for name in names:
        file = folder / f"{name}{suffix}"
        if not file.is_file():
            raise DataError(f"'{folder}' must hold the file {file.name} of CIFAR-10")
        pixels, labels = _read_binary(file) if suffix else _read_pickle(file)
        for image, label in zip(pixels, labels, strict=True):
            # stored by planes of colour
            content = image.reshape(3, 32, 32).transpose(1, 2, 0)
            yield Record(f"{'train' if training else 'test'}/{row:05d}", int(label), content)
            row += 1


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(file, np.uint8)
    if not len(content) or len(content) % (1 + _CIFAR_PIXELS):
        raise DataError(
            f"'{file}' must hold records of {1 + _CIFAR_PIXELS} bytes, got {len(content)} bytes"
        )
    rows = content.reshape(-1, 1 + _CIFAR_PIXELS)
    return rows[:, 1:], _check_labels(file, rows[:, 0])


class _PickledDtype:
    """Stands in for numpy's: only plain integers."""

    def __init__(self, code: str | bytes, align: bool = False, copy: bool = False) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if self.code not in ("u1", "i4", "i8"):
            raise pickle.UnpicklingError(f"arrays must hold integers, got {self.code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("|", "<", b"|", b"<"):
            raise pickle.UnpicklingError(f"arrays must be little-endian, got {state[1]!r}")


class _PickledArray:
    """Stands in for numpy's, whose own way back from a pickle trusts what it reads."""

    def __init__(self) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, content = state
        flat = np.frombuffer(content, f"<{dtype.code}")
        self.array = flat.reshape(shape, order="F" if column_major else "C")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 of Python 3 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be written as latin1, got {encoding!r}")
    return text.encode("latin1")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> _PickledArray:
    """How a pickle makes an array: an empty one, filled afterwards."""
    return _PickledArray()


def _from_buffer(
    content: bytes, dtype: _PickledDtype, shape: tuple[int, ...], order: str
) -> _PickledArray:
    """How protocol 5 makes an array."""
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, bytes and arrays of integers; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.ndarray": _PickledArray,
            "numpy.dtype": _PickledDtype,
            "_codecs.encode": _encode_latin1,
            "numpy.core.multiarray._reconstruct": _reconstruct,
            "numpy._core.multiarray._reconstruct": _reconstruct,
            "numpy.core.numeric._frombuffer": _from_buffer,
            "numpy._core.numeric._frombuffer": _from_buffer,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, for which a batch of CIFAR-10 has no use"
            )
        return known[f"{module}.{name}"]


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        # pickles written by Python 3 have text keys
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = (
            field.array if isinstance(field, _PickledArray) else np.asarray(field)
            for field in (fields["data"], fields["labels"])
        )
    # whatever damaged bytes make the machine of pickles raise
    except Exception as error:
        raise DataError(
            f"'{file}' is not a batch of CIFAR-10: {type(error).__name__}: {first_line(error)}"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _CIFAR_PIXELS:
        raise DataError(
            f"'{file}' must hold data [N, {_CIFAR_PIXELS}] uint8, "
            f"got {list(pixels.shape)} {pixels.dtype}"
        )
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"'{file}' must hold {len(pixels)} integer labels, got {list(labels.shape)} "
            f"{labels.dtype}"
        )
    return pixels, _check_labels(file, labels)


def _check_labels(file: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise DataError(f"'{file}' must hold labels from 0 to 9, got up to {labels.max()}")
    return labels


def _celeba_records(folder: Path, table: Path, split: str) -> Iterator[Record]:
    part = {"train": "0", "validation": "1", "test": "2"}[split]
    images: Path | None = None
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"'{table}' must be text, got {first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        fields = line.replace(",", " ").split()
        if not fields or (number == 1 and fields[0] == "image_id"):
            continue
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise DataError(
                f"line {number} of '{table}' must be an image and its part 0, 1 or 2, got '{line}'"
            )
        if fields[1] != part:
            continue
        images = images or _celeba_images(folder, fields[0])
        yield Record(fields[0], None, images / fields[0])
    if images is None:
        raise DataError(f"'{table}' has no image in part {part} ({split})")


def _celeba_images(folder: Path, first: str) -> Path:
    places = [folder / name for name in _CELEBA_FOLDERS]
    found = next((place for place in places if (place / first).is_file()), None)
    if found is None:
        raise DataError(
            f"'{folder}' must hold '{first}' in one of {', '.join(_CELEBA_FOLDERS[:-1])}"
        )
    return found


def _artbench_records(folder: Path, table: Path, split: str) -> Iterator[Record]:
    part = "train" if split == "train" else "test"
    images: Path | None = None
    with table.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened)
        missing = {"name", "label", "split"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(f"'{table}' must have the columns name, label and split")
        for number, row in enumerate(rows):
            if row["split"] != part:
                continue
            label = class_label(row["label"] or "", ARTBENCH_CLASSES, f"{table.name}, row {number}")
            name = f"{ARTBENCH_CLASSES[label]}/{row['name']}"
            images = images or _artbench_images(folder, name, part)
            yield Record(name, label, images / name)
    if images is None:
        raise DataError(f"'{table}' has no image of the part {part}")


def _artbench_images(folder: Path, first: str, part: str) -> Path:
    places = [folder / name.format(split=part) for name in _ARTBENCH_FOLDERS]
    found = next((place for place in places if (place / first).is_file()), None)
    if found is None:
        raise DataError(f"'{folder}' must hold '{first}', in itself or in {_ARTBENCH_FOLDERS[0]}")
    return found
