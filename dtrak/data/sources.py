"""Where images lie: digits, folders, parquet files, Hugging Face data sets; one record an image.

Nothing is decoded here: a record holds the encoded bytes, the path or the raw pixels of an image.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..runs.choices import counted
from ..runs.files import expand_path
from .walk import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIX,
    DataError,
    Walk,
    check_shards,
    class_folders,
    part_of,
    shard_of,
    split_names,
    walk,
)

__all__ = ["DataError", "split_names"]

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
KINDS = (
    "'digits', a folder of images, one image, a .parquet file, "
    "a folder written by datasets' save_to_disk, or a hub name"
)
# each that is not there is a question to the hub
_HUB_PARTS = {"validation": ("validation", "valid", "val", "test")}
_SHOWN = 10
# what the hub calls a part whose beginning alone it converted to parquet
_PARTIAL = "partial-"


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


@dataclass
class Found:
    """The images of a source.

    Attributes:
        records: one for each, in an order that is always the same.
        taken: what they are of, in words; empty for the source as a whole.
        left_out: what lies there and was not taken, in words.
        class_names: of labels, where they are known.
        tables: the file behind each id ``<name of the file>/<row>``, by that name.
    """

    records: Iterator[Record]
    taken: str = ""
    left_out: Sequence[str] = ()
    tables: dict[str, Path] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 digits, read once: images ``[N, 8, 8]`` of 0 to 16, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for kept in (found.images, found.target):
        kept.setflags(write=False)
    return found.images, found.target


def digits_split(seed: int = 42) -> tuple[list[int], list[int]]:
    """Draw 1,000 training and 200 validation digits, disjoint and stratified by label.

    Args:
        seed: of the draw.

    Returns:
        Positions in scikit-learn's 1,797 digits, in the order of the draw: (train, validation).
    """
    from sklearn.model_selection import train_test_split

    _, target = digits()
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
    """The records of `find_records`."""
    return find_records(name, split, classes=classes, stems=stems).records


def find_records(
    name: str,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    stems: Sequence[str] = (),
) -> Found:
    """Find out what ``name`` is and walk its images, in an order that is always the same.

    Args:
        name: as ``source`` of `dtrak.data.images.load_data`.
        split: which part; `walk.split_names` lists what it may be called.
        classes: names of the classes, in the order of their labels. A folder of images is then read
            as ``<split>/<class>/<image>`` or, without parts, ``<class>/<image>``; an empty list
            leaves the classes out. None reads every image of the part, labelled by class folders
            where there are any.
        stems: of the parquet files that are meant in a folder of several, in order of preference.

    Raises:
        FileNotFoundError: ``name`` is a path and nothing is there.
        ValueError: the source has no part ``split``.
        DataError: the source is damaged, incomplete, empty, or of none of the known kinds.
    """
    if name == "digits":
        return Found(_digit_records(split))
    path = expand_path(name)
    if path.is_dir():
        return _open_folder(path, name, split, classes, stems)
    if path.is_file():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            _refuse_split(name, split, "an image")
            return Found(iter([Record(path.name, None, path)]))
        if path.suffix.lower() != TABLE_SUFFIX:
            raise DataError(
                f"'{name}' is a file but neither an image nor a .parquet file; data must be {KINDS}"
            )
        _refuse_split(name, split, "a parquet file")
        total = shard_of(path)
        others = () if total is None else (f"the others of {total} files (one is named)",)
        return Found(_parquet_records(path, classes), "", others, {path.name: path})
    if _looks_like_a_path(name):
        raise missing_path(name)
    return Found(_hub_records(name, split, classes))


def _open_folder(
    folder: Path, name: str, split: str, classes: Sequence[str] | None, stems: Sequence[str]
) -> Found:
    from .layouts import open_layout

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Found(_saved_records(folder, split, classes))
    published = open_layout(folder, split)
    if published is not None:
        return Found(published)
    everything = walk(folder)
    if everything.tables and not _are_pictures(everything):
        files = choose_tables(folder, [file for _, file in everything.tables], split, stems)
        records = (record for file in files for record in _parquet_records(file, classes))
        named = [file.relative_to(folder).as_posix() for file in files]
        taken = named[0] if len(named) == 1 else f"{named[0]} and {len(named) - 1} more files"
        others = len(everything.tables) - len(files)
        left_out = []
        if others:
            left_out = [f"{counted(others, 'other parquet file')} (in another part)"]
        if any(map(_is_partial, files[0].relative_to(folder).parts)):
            left_out.append(
                f"the rest of the data set (the hub converts no more than '{named[0]}')"
            )
        return Found(records, taken, left_out, {file.name: file for file in files})
    if classes is not None:
        return _class_records(folder, split, classes)
    return _folder_records(folder, name, split)


def _are_pictures(found: Walk) -> bool:
    """Whether a folder with tables is one of images all the same.

    Raises:
        DataError: it cannot be told.
    """
    if any("/" not in name for name, _ in found.images):
        return True
    near = [name for name, _ in found.tables if "/" not in name.removeprefix("data/")]
    if found.images and not near:
        raise DataError(
            f"'{found.folder}' holds images ('{found.images[0][0]}') and tables "
            f"('{found.tables[0][0]}'): name the folder or the file that is meant"
        )
    return False


def choose_tables(
    folder: Path, files: Sequence[Path], split: str, stems: Sequence[str] = ()
) -> list[Path]:
    """The parquet files of one data set that hold ``split``, all of them.

    A folder says so (``default/train/0000.parquet``), or the name of a file (``<stem>-<split>…``).

    Raises:
        ValueError: folders are parts, and none is that one.
        DataError: it cannot be told which, they are of several data sets, or one is missing.
    """
    found = _of_part(folder, files, split, stems)
    places = sorted({file.parent for file in found})
    if len(places) > 1:
        names = ", ".join(place.relative_to(folder).as_posix() for place in places)
        raise DataError(f"'{folder}' must hold one data set, got {names}: name the folder of one")
    check_shards(found)
    return found


def _of_part(folder: Path, files: Sequence[Path], split: str, stems: Sequence[str]) -> list[Path]:
    parts = {file: _part_above(file.parent.relative_to(folder).parts) for file in files}
    if any(parts.values()):
        for part in split_names(split):
            found = [file for file in files if parts[file] == part]
            if found:
                return found
        raise ValueError(
            f"'{folder}' must have a folder {' or '.join(split_names(split))} for the split "
            f"'{split}', got {', '.join(sorted({part for part in parts.values() if part}))}"
        )
    # a clone of a data set keeps them in data/, and the folder's own come first
    nearest = min(len(file.relative_to(folder).parts) for file in files)
    near = [f for f in files if len(f.relative_to(folder).parts) == nearest]
    if folder / "data" in {file.parent for file in near}:
        near = [file for file in near if file.parent == folder / "data"]
    for stem in (*stems, ""):
        for part in split_names(split):
            found = [f for f in near if f.name.startswith(f"{stem}-{part}" if stem else part)]
            if found:
                return found
    ends = [f for f in near for part in split_names(split) if f.stem.endswith(f"-{part}")]
    if len(ends) == 1:
        return ends
    within = [f for f in near for part in split_names(split) if f"-{part}-" in f.stem]
    if within:
        return within
    of_none = [f for f in near if part_of(f.stem, loosely=True) is None]
    stemless = {re.sub(r"\d+(-of-\d+)?(-[0-9a-f]+)?$", "", file.stem) for file in of_none}
    if split == "train" and of_none and len(of_none) == len(near) and len(stemless) == 1:
        return of_none
    raise DataError(
        f"'{folder}' must hold one parquet file of the part '{split}', "
        f"got {', '.join(file.name for file in files)}; name the file itself"
    )


def _part_above(folders: Sequence[str]) -> str | None:
    """The name of the innermost folder that is called after a part."""
    names = [name.lower().removeprefix(_PARTIAL) for name in reversed(folders)]
    return next((name for name in names if part_of(name)), None)


def _is_partial(folder: str) -> bool:
    return folder.lower().startswith(_PARTIAL)


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
    images, target = digits()
    for position in digits_positions(split):
        pixels = np.rint(images[position] * (255 / 16)).astype(np.uint8)
        yield Record(f"digits/{position:04d}", int(target[position]), pixels)


def _refuse_none(found: Walk) -> None:
    if not found.images:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        left = f"; left out: {'; '.join(found.left_out)}" if found.left_out else ""
        raise DataError(f"no images ({kinds}) in the folder '{found.folder}'{left}")


def _folder_records(folder: Path, name: str, split: str) -> Found:
    found = walk(folder, split)
    if split != "train" and not found.parts:
        _refuse_split(name, split, "a folder of images without parts")
    _refuse_none(found)
    labels = class_folders([_below(name, found.parts) for name, _ in found.images])
    taken = ", ".join(found.parts)
    if labels is not None:
        listed = [f"{name} {label}" for name, label in sorted(labels.items(), key=itemgetter(1))]
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        told = f"classes by folder: {', '.join(listed[:_SHOWN])}{more}"
        taken = f"{taken}; {told}" if taken else told
    records = (
        Record(name, None if labels is None else labels[_class_of(name, found.parts)], path)
        for name, path in found.images
    )
    names = {label: name for name, label in (labels or {}).items() if not name.isdecimal()}
    tables = (
        [f"{counted(len(found.tables), 'parquet file')} (beside images)"] if found.tables else []
    )
    return Found(records, taken, [*found.left_out, *tables], class_names=names)


def _below(name: str, parts: Sequence[str]) -> str:
    """The name of an image below the part that it lies in."""
    return next((name[len(part) + 1 :] for part in parts if name.startswith(f"{part}/")), name)


def _class_of(name: str, parts: Sequence[str]) -> str:
    return _below(name, parts).rpartition("/")[0]


def _class_records(folder: Path, split: str, classes: Sequence[str]) -> Found:
    """Walk ``<split>/<class>/<image>``; the classes may be missing, and the parts for training."""
    parts = [part for part in split_names(split) if (folder / part).is_dir()]
    others = [part for part in ("train", *split_names("validation")) if (folder / part).is_dir()]
    if not parts and (others or split != "train"):
        raise ValueError(
            f"'{folder}' must have a folder {' or '.join(split_names(split))} for the split "
            f"'{split}', got {', '.join(others) or 'none'}"
        )
    found = walk(folder / parts[0] if parts else folder)
    _refuse_none(found)
    records = (
        Record(
            f"{parts[0]}/{name}" if parts else name,
            class_label(path.parent.name, classes, path) if classes else None,
            path,
        )
        for name, path in found.images
    )
    return Found(records, parts[0] if parts else "", found.left_out)


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
                        f"{path.name}/{row}", values[image], values.get(LABEL_COLUMN), path.parent
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
        yield from dataset_records(loaded[part], f"{folder.name}/{part}", classes, folder)
    else:
        _refuse_split(str(folder), split, "a single saved data set")
        yield from dataset_records(loaded, folder.name, classes, folder)


def _hub_records(name: str, split: str, classes: Sequence[str] | None) -> Iterator[Record]:
    import datasets

    parts = _HUB_PARTS.get(split, (split,))
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


def dataset_records(
    dataset: Any, name: str, classes: Sequence[str] | None, folder: Path = Path()
) -> Iterator[Record]:
    """Walk a ``datasets.Dataset`` with its images left encoded, for our own decoding.

    Images that are not in it lie relative to ``folder``.
    """
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
        record = _row_record(f"{name}/{row}", values[image], values.get(LABEL_COLUMN), folder)
        yield _with_bytes(record, partial(_reread_column, pictures, row, image))


def _reread_column(pictures: Any, row: int, column: str) -> bytes:
    content: bytes = pictures[row][column]["bytes"]
    return content


def _with_bytes(record: Record, reread: Callable[[], bytes]) -> Record:
    """A record that can be read again; one with a path can anyway."""
    return record._replace(reread=reread) if isinstance(record.content, bytes) else record


def _row_record(name: str, image: dict[str, Any] | None, label: int | None, folder: Path) -> Record:
    """A row of a table; an image that is not in it lies relative to ``folder``."""
    image = image or {}
    content: bytes | Path | None = image.get("bytes")
    if content is None and image.get("path"):
        content = folder / expand_path(image["path"])
    return Record(name, label, content)


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its later lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
