"""Where images lie: digits, folders, parquet files, Hugging Face data sets; one record an image.

Nothing is decoded here: a record holds the encoded bytes, the path or the raw pixels of an image.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
KINDS = (
    "'digits', a folder of images, one image, a .parquet file, "
    "a folder written by datasets' save_to_disk, or a hub name"
)
# the held-out part goes by several names; the first that is there counts
_SPLIT_NAMES = {"validation": ("validation", "valid", "val", "test")}


class DataError(ValueError):
    """Images that cannot be used as they are; the message says which and why, in one line."""


class Record(NamedTuple):
    """One image before decoding.

    Attributes:
        id: a name that stays the same when the data is moved.
        label: its class, or None.
        content: its encoded bytes, its path, its pixels [H, W] or [H, W, 3] uint8, or a PIL image.
        reread: gives its content again, where they are too many to keep; or None.
    """

    id: str
    label: int | None
    content: Any
    reread: Callable[[], Any] | None = None


def digits_split(seed: int = 42) -> tuple[list[int], list[int]]:
    """Draw 1,000 training and 200 validation digits, disjoint and stratified by label.

    Args:
        seed: of the draw.

    Returns:
        Positions in scikit-learn's 1,797 digits, in the order of the draw: (train, validation).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    target = load_digits().target
    train, validation = train_test_split(
        np.arange(len(target)), train_size=1000, test_size=200, stratify=target, random_state=seed
    )
    return train.tolist(), validation.tolist()


def digits_positions(split: str) -> list[int]:
    """Positions of ``split`` in scikit-learn's digits.

    Raises:
        ValueError: the split is not train, validation or all.
    """
    train, validation = digits_split()
    parts = {"train": train, "validation": validation, "all": list(range(1797))}
    if split not in parts:
        raise ValueError(f"split of 'digits' must be one of {', '.join(parts)}, got '{split}'")
    return parts[split]


def open_records(
    name: str,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    stems: Sequence[str] = (),
) -> Iterator[Record]:
    """Find out what ``name`` is and walk its images, in an order that is always the same.

    Args:
        name: as ``source`` of `dtrak.data.images.load_data`.
        split: which part; where there is none called ``"validation"``, a part called ``"valid"``,
            ``"val"`` or ``"test"`` is meant.
        classes: names of the classes, in the order of their labels. A folder of images is then read
            as ``<split>/<class>/<image>`` or, without parts, ``<class>/<image>``; an empty list
            leaves the classes out. None reads every image of the folder, without labels.
        stems: of the parquet files that are meant in a folder of several, in order of preference.

    Raises:
        FileNotFoundError: ``name`` is a path and nothing is there.
        ValueError: the source has no part ``split``.
        DataError: the source is damaged, empty, or of none of the known kinds.
    """
    if name == "digits":
        return _digit_records(split)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, name, split, classes, stems)
    if path.is_file():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            _refuse_split(name, split, "an image")
            return iter([Record(path.name, None, path)])
        if path.suffix.lower() != ".parquet":
            raise DataError(
                f"'{name}' is a file but neither an image nor a .parquet file; data must be {KINDS}"
            )
        _refuse_split(name, split, "a parquet file")
        return _parquet_records(path, classes)
    if _looks_like_a_path(name):
        raise missing_path(name)
    return _hub_records(name, split, classes)


def _open_folder(
    folder: Path, name: str, split: str, classes: Sequence[str] | None, stems: Sequence[str]
) -> Iterator[Record]:
    from .layouts import open_layout

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_records(folder, split, classes)
    published = open_layout(folder, split)
    if published is not None:
        return published
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    pictures = any(f.name.lower().endswith(IMAGE_SUFFIXES) for f in folder.iterdir())
    if files and not pictures:
        chosen = _parquet_files(folder, files, split, stems)
        return (record for file in chosen for record in _parquet_records(file, classes))
    if classes is None:
        _refuse_split(name, split, "a folder of images")
        return _folder_records(folder)
    return _class_records(folder, split, classes)


def split_names(split: str) -> tuple[str, ...]:
    """What a part may be called where it lies, in order of preference."""
    return _SPLIT_NAMES.get(split, (split,))


def _parquet_files(
    folder: Path, files: Sequence[Path], split: str, stems: Sequence[str]
) -> list[Path]:
    """The files of one data set that hold ``split``, named ``<stem>-<split>…``."""
    for stem in (*stems, ""):
        for part in split_names(split):
            found = [f for f in files if f.name.startswith(f"{stem}-{part}" if stem else part)]
            if found:
                return found
    parts = [f for f in files for part in split_names(split) if f.stem.endswith(f"-{part}")]
    if len(parts) == 1:
        return parts
    raise DataError(
        f"'{folder}' must hold one parquet file of the part '{split}', "
        f"got {', '.join(file.name for file in files)}; name the file itself"
    )


def missing_path(name: str) -> FileNotFoundError:
    """The error for a source that is a path where nothing lies."""
    return FileNotFoundError(f"no file or folder at '{name}'; data must be {KINDS}")


def _refuse_split(name: str, split: str, kind: str) -> None:
    if split != "train":
        raise ValueError(f"split must be 'train' for {kind} ('{name}'), got '{split}'")


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.lower().endswith((".parquet", *IMAGE_SUFFIXES))
    )


def _digit_records(split: str) -> Iterator[Record]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for position in digits_positions(split):
        pixels = np.rint(digits.images[position] * (255 / 16)).astype(np.uint8)
        yield Record(f"digits/{position:04d}", int(digits.target[position]), pixels)


def _image_paths(folder: Path) -> list[tuple[str, Path]]:
    """Every image below ``folder`` with its path relative to it, in the order of these paths."""
    paths = [
        Path(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        # a leading dot marks the resource forks some archives carry: not images
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    ]
    if not paths:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise DataError(f"no images ({kinds}) in the folder '{folder}'")
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)


def _folder_records(folder: Path) -> Iterator[Record]:
    for name, path in _image_paths(folder):
        yield Record(name, None, path)


def _class_records(folder: Path, split: str, classes: Sequence[str]) -> Iterator[Record]:
    """Walk ``<split>/<class>/<image>``; the classes may be missing, and the parts for training."""
    parts = [part for part in split_names(split) if (folder / part).is_dir()]
    others = [part for part in ("train", *split_names("validation")) if (folder / part).is_dir()]
    if not parts and (others or split != "train"):
        raise ValueError(
            f"'{folder}' must have a folder {' or '.join(split_names(split))} for the split "
            f"'{split}', got {', '.join(others) or 'none'}"
        )
    root = folder / parts[0] if parts else folder
    for name, path in _image_paths(root):
        label = class_label(path.parent.name, classes, path) if classes else None
        yield Record(f"{parts[0]}/{name}" if parts else name, label, path)


def class_label(name: str, classes: Sequence[str], where: str | Path) -> int:
    """The label of the class called ``name``, whatever its case, spaces or hyphens.

    Raises:
        DataError: there is no such class; the message names it and ``where`` it was found.
    """
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    if plain not in classes:
        raise DataError(f"classes must be among {', '.join(classes)}, got '{name}' (at '{where}')")
    return list(classes).index(plain)


def _parquet_records(path: Path, classes: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{path}' is not a readable parquet file: {first_line(error)}") from error
    with file:
        schema = file.schema_arrow
        image = next(
            (
                column
                for column in IMAGE_COLUMNS
                if column in schema.names
                and pa.types.is_struct(schema.field(column).type)
                and schema.field(column).type.get_field_index("bytes") >= 0
            ),
            None,
        )
        if image is None:
            raise DataError(
                f"'{path}' has no column 'image' or 'img' of {{bytes, path}}; "
                f"its columns: {', '.join(f'{f.name} ({f.type})' for f in schema) or 'none'}"
            )
        if file.metadata.num_rows == 0:
            raise DataError(f"'{path}' has no rows")
        labelled = LABEL_COLUMN in schema.names and pa.types.is_integer(
            schema.field(LABEL_COLUMN).type
        )
        columns = [image, LABEL_COLUMN] if labelled else [image]
        if labelled:
            _check_classes(_parquet_classes(schema), classes, path)
        row, reader = 0, _RowGroups(path, image)
        try:
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for values in batch.to_pylist():
                    record = _row_record(
                        f"{path.name}/{row}", values[image], values.get(LABEL_COLUMN)
                    )
                    yield _with_bytes(record, partial(_reread, reader, row))
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"'{path}' is not a readable parquet file, at row {row}: {first_line(error)}"
            ) from error


class _RowGroups:
    """The images of a parquet file by row, the last group of rows at hand."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._starts: list[int] = []
        self._group, self._images = -1, None

    def __getitem__(self, row: int) -> dict[str, Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            if not self._starts:
                sizes = [
                    file.metadata.row_group(group).num_rows
                    for group in range(file.metadata.num_row_groups)
                ]
                self._starts = [sum(sizes[:group]) for group in range(len(sizes))]
            group = bisect_right(self._starts, row) - 1
            if group != self._group:
                self._images = file.read_row_group(group, columns=[self.column]).column(0)
                self._group = group
        assert self._images is not None
        image: dict[str, Any] = self._images[row - self._starts[group]].as_py()
        return image


def _reread(rows: Any, row: int) -> bytes:
    content: bytes = rows[row]["bytes"]
    return content


def _parquet_classes(schema: Any) -> list[str] | None:
    """The class names that datasets wrote into a parquet file."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        return list(info["info"]["features"][LABEL_COLUMN]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _check_classes(
    found: Sequence[str] | None, classes: Sequence[str] | None, where: str | Path
) -> None:
    """Labels are numbers: refuse a source that says they stand for other classes."""
    if not found or not classes:
        return
    plain = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in found]
    if plain != list(classes):
        raise DataError(
            f"the classes of '{where}' must be {', '.join(classes)} in this order, "
            f"got {', '.join(found)}"
        )


def _saved_records(folder: Path, split: str, classes: Sequence[str] | None) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"datasets cannot load '{folder}': {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        part = next((part for part in split_names(split) if part in loaded), None)
        if part is None:
            raise ValueError(
                f"split of '{folder}' must be one of {', '.join(loaded)}, got '{split}'"
            )
        yield from dataset_records(loaded[part], f"{folder.name}/{part}", classes)
    else:
        _refuse_split(str(folder), split, "a single saved data set")
        yield from dataset_records(loaded, folder.name, classes)


def _hub_records(name: str, split: str, classes: Sequence[str] | None) -> Iterator[Record]:
    import datasets

    parts = split_names(split)
    with _offline_without_a_hub(name):
        for part in parts:
            try:
                loaded = datasets.load_dataset(name, split=part)
                break
            # the library raises some ten unrelated types here: no such name, no network, no such
            # split, …
            except Exception as error:
                if part != parts[-1] and "split" in str(error).lower():
                    continue
                raise DataError(
                    f"'{name}' is no existing path, and "
                    f"datasets.load_dataset('{name}', split='{part}') failed "
                    f"({type(error).__name__}: {first_line(error)}); data must be {KINDS}"
                ) from error
    yield from dataset_records(loaded, f"{name}/{part}", classes)


@contextmanager
def _offline_without_a_hub(name: str) -> Iterator[None]:
    """Load from the cache alone where the hub cannot be reached, instead of half a minute later."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        offline = False
    except huggingface_hub.errors.HfHubHTTPError:
        # it answered, if only that there is no such data set
        offline = False
    # whatever the client raises when there is no connection: it differs between its versions
    except Exception:
        offline = True
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or offline
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def dataset_records(dataset: Any, name: str, classes: Sequence[str] | None) -> Iterator[Record]:
    """Walk a ``datasets.Dataset`` with its images left encoded, for our own decoding."""
    import datasets

    features = dataset.features
    candidates = [column for column in features if isinstance(features[column], datasets.Image)]
    image = next((column for column in IMAGE_COLUMNS if column in candidates), None)
    image = image or (candidates[0] if len(candidates) == 1 else None)
    if image is None:
        raise DataError(
            f"'{name}' has no image column; its columns: {', '.join(features) or 'none'}"
        )
    if len(dataset) == 0:
        raise DataError(f"'{name}' has no rows")
    encoded = dataset.cast_column(image, datasets.Image(decode=False))
    kind = getattr(features.get(LABEL_COLUMN), "dtype", "")
    columns = [image, LABEL_COLUMN] if kind.startswith(("int", "uint")) else [image]
    if LABEL_COLUMN in columns:
        _check_classes(getattr(features[LABEL_COLUMN], "names", None), classes, name)
    pictures = encoded.select_columns([image])
    for row, values in enumerate(encoded.select_columns(columns)):
        record = _row_record(f"{name}/{row}", values[image], values.get(LABEL_COLUMN))
        yield _with_bytes(record, partial(_reread_column, pictures, row, image))


def _reread_column(pictures: Any, row: int, column: str) -> bytes:
    content: bytes = pictures[row][column]["bytes"]
    return content


def _with_bytes(record: Record, reread: Callable[[], bytes]) -> Record:
    """A record that can be read again; one with a path can anyway."""
    return record._replace(reread=reread) if isinstance(record.content, bytes) else record


def _row_record(name: str, image: dict[str, Any] | None, label: int | None) -> Record:
    image = image or {}
    content: bytes | Path | None = image.get("bytes")
    if content is None and image.get("path"):
        content = Path(image["path"])
    return Record(name, label, content)


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its later lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
