"""Captions of images: read beside them, or made from their class by a template."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

from ..runs.files import expand_path, write_atomically
from .samples import Samples
from .sources import first_line
from .walk import IMAGE_SUFFIXES, TABLE_SUFFIX, DataError, walk

CAPTION_COLUMNS = ("text", "caption")
_HOW = (
    "metadata.jsonl beside the images with {file_name, text}, a column 'text', or --caption, such "
    "as --caption 'a {label} painting'"
)


def read_captions(source: str, data: Samples) -> list[str] | None:
    """The captions that lie with the images of ``data``.

    Args:
        source: where ``data`` was loaded from: a folder of images with ``metadata.jsonl`` or
            ``metadata.csv`` (columns ``file_name`` and ``text``, in any folder of it, names
            relative to theirs, as datasets' image folders have them); a parquet file or a data set
            with a column ``text`` or ``caption``.
        data: the images; their ids say which row or file they are.

    Returns:
        N captions, or None where the source has none at all.

    Raises:
        DataError: some images have a caption and one has none, a caption is not text, or the file
            that holds them is not readable.
    """
    found = _find(source, data)
    if found is None:
        return None
    captions = [found(name) for name in data.ids]
    for name, caption in zip(data.ids, captions, strict=True):
        if not isinstance(caption, str):
            raise DataError(
                f"the caption of '{name}' in '{source}' must be text, got "
                f"{'none' if caption is None else type(caption).__name__}"
            )
    check_texts(captions, data.ids)
    return captions


def check_texts(captions: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse captions that no tokenizer reads: halves of letters, or bytes that are no text.

    Raises:
        DataError: names the first.
    """
    for name, caption in zip(names, captions, strict=True):
        try:
            str(caption).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the caption of '{name}' must be text in Unicode, got {caption!a}"
            ) from error


def caption_all(template: str, source: str, data: Samples) -> list[str]:
    """One caption for every image, ``{label}`` in it replaced by the name of the image's class.

    The class of an image in a folder is the folder it lies in; elsewhere it is the column
    ``label``, by name where names are known. Underscores become spaces, capitals small letters: the
    published captions are ``a {label} painting``.

    Args:
        template: text, with or without ``{label}``.
        source: as in `read_captions`.
        data: the images.

    Raises:
        DataError: the template has another field than ``{label}``, or an image has no class.

    Source:
        D-TRAK's train_text_to_image_lora.py at e2a0c2e.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise DataError(f"--caption must be text with {{label}}, got {template!r}") from error
    if fields - {"label"}:
        raise DataError(
            f"--caption may hold {{label}} and no other field, got {template!r} with "
            f"{', '.join(sorted(fields - {'label'})) or 'an empty one'}"
        )
    if not fields:
        return [template.format()] * len(data)
    labels = _class_names(source, data)
    captions = [template.format(label=label.replace("_", " ").lower()) for label in labels]
    check_texts(captions, data.ids)
    return captions


def load_captions(source: str, data: Samples, template: str | None = None) -> list[str]:
    """The captions of ``data``: by the template where one is given, else those that lie with it.

    Args:
        source: as in `read_captions`.
        data: the images.
        template: as in `caption_all`.

    Raises:
        DataError: there are none, or as in `read_captions` and `caption_all`.
    """
    if template is not None:
        return caption_all(template, source, data)
    captions = read_captions(source, data)
    if captions is None:
        raise DataError(f"the images of '{source}' must have captions: {_HOW}")
    return captions


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Write ``metadata.jsonl`` for pictures by their file names, as `read_captions` reads it."""
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(folder / "metadata.jsonl", lines.encode())


def read_prompts(text: str) -> list[str]:
    """What ``--prompts`` says: the lines of a file, or a text itself.

    Raises:
        FileNotFoundError: the name of a ``.txt`` file that is not there.
        ValueError: the file holds no line of text.
    """
    # not Path.is_file, which raises where a long prompt is no valid name
    file = Path(os.path.expanduser(text))
    if not os.path.isfile(file):
        if text.endswith(".txt"):
            raise FileNotFoundError(f"--prompts must be a text or a file of them, got {text}")
        check_texts([text], ["--prompts"])
        return [text]
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts must be a text file in UTF-8, got {file}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts must be a file with one prompt per line, got none in {file}")
    return prompts


def choose_prompts(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed: seed i takes prompt i, from the start again after the last."""
    return [prompts[seed % len(prompts)] for seed in seeds]


def _find(source: str, data: Samples) -> Callable[[str], Any] | None:
    """What gives the caption of an id, or None where the source has no captions."""
    path = expand_path(source)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        # of one image, as of the folder it lies in
        return _by_file(path.parent, is_whole=False)
    if path.is_file():
        return _by_row({path.name: _parquet_column(path, CAPTION_COLUMNS)})
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _by_row(_dataset_column(source, data, CAPTION_COLUMNS))
        files = _parquet_files(data)
        if files:
            return _by_row({file.name: _parquet_column(file, CAPTION_COLUMNS) for file in files})
        return _by_file(path)
    if source == "digits":
        return None
    return _by_row(_dataset_column(source, data, CAPTION_COLUMNS))


def _by_row(columns: dict[str, list[Any] | None]) -> Callable[[str], Any] | None:
    """Captions by ids ``<name of the table>/<row>``."""
    if any(column is None for column in columns.values()):
        return None

    def find(name: str) -> Any:
        table, row = name.rsplit("/", 1)
        column = columns[table]
        assert column is not None
        return column[int(row)]

    return find


def _by_file(folder: Path, *, is_whole: bool = True) -> Callable[[str], Any] | None:
    """Captions by paths relative to ``folder``, from every metadata file in it.

    Args:
        folder: of the images.
        is_whole: whether all images that the files name must be there.
    """
    captions: dict[str, Any] = {}
    files = walk(folder).metadata
    for name, file in files:
        above = PurePosixPath(name).parent
        if file.suffix == TABLE_SUFFIX:
            raise DataError(f"captions must be in metadata.jsonl or metadata.csv, got {file}")
        for number, row in enumerate(_read_rows(file), 1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise DataError(f"{file}, row {number} must have a file_name, got {row}")
            column = next((c for c in CAPTION_COLUMNS if c in row), None)
            if column is None:
                raise DataError(
                    f"{file}, row {number} must have a caption as 'text', got {', '.join(row)}"
                )
            image = os.path.normpath(file.parent / expand_path(row["file_name"]))
            if is_whole and not os.path.exists(image):
                raise DataError(
                    f"{file}, row {number} must name an image that is there, got "
                    f"{row['file_name']!r}"
                )
            captions[_relative(image, folder, above / row["file_name"])] = row[column]
    return captions.get if files else None


def _relative(image: str, folder: Path, name: PurePosixPath) -> str:
    """An image's path below a folder, as its id has it."""
    if name.is_absolute() or name.parts[:1] == ("~",):
        return os.path.relpath(image, folder.absolute())
    return os.path.normpath(name)


def _read_rows(file: Path) -> list[Any]:
    is_csv = file.suffix == ".csv"
    try:
        # spreadsheets put a byte order mark first
        text = file.read_text(encoding="utf-8-sig")
        if is_csv:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        # not splitlines, which also splits at characters that a caption may hold
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        kind = "CSV" if is_csv else "lines of JSON"
        raise DataError(f"{file} must be {kind} in UTF-8, got {first_line(error)}") from error


def _parquet_files(data: Samples) -> list[Path]:
    """The parquet files of a folder that images came from."""
    names = {name.rsplit("/", 1)[0] for name in data.ids}
    return [file for name, file in data.tables.items() if name in names]


def _parquet_column(file: Path, columns: Sequence[str]) -> list[Any] | None:
    """The first of ``columns`` that there is, class numbers as their names where known."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    column = next((c for c in columns if c in schema.names), None)
    if column is None:
        return None
    values: list[Any] = pq.read_table(file, columns=[column])[column].to_pylist()
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return values
    return [_class_name(names, value) for value in values]


def _class_name(names: Sequence[str], value: Any) -> str | None:
    """The name of a class number; None where it says that there is no class, as -1 does."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _dataset_column(
    source: str, data: Samples, columns: Sequence[str]
) -> dict[str, list[Any] | None]:
    """The first of ``columns`` that a data set has, by the part its images came from."""
    import datasets

    found: dict[str, list[Any] | None] = {}
    for table in sorted({name.rsplit("/", 1)[0] for name in data.ids}):
        part = table.rsplit("/", 1)[-1]
        if expand_path(source).exists():
            loaded = datasets.load_from_disk(str(expand_path(source)))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[part]
        else:
            # the images were loaded a moment ago: it is in the cache
            loaded = datasets.load_dataset(source, split=part)
        column = next((c for c in columns if c in loaded.column_names), None)
        values = None if column is None else list(loaded[column])
        names = None if column is None else getattr(loaded.features[column], "names", None)
        if values is not None and names is not None:
            values = [_class_name(names, value) for value in values]
        found[table] = values
    return found


def _class_names(source: str, data: Samples) -> list[str]:
    path = expand_path(source)
    columns: dict[str, list[Any] | None]
    if path.is_file():
        columns = {path.name: _parquet_column(path, ("label",))}
    elif path.is_dir() and _parquet_files(data):
        columns = {f.name: _parquet_column(f, ("label",)) for f in _parquet_files(data)}
    elif path.is_dir() and not any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    ):
        return [_folder_of(name, source) for name in data.ids]
    elif source == "digits":
        columns = {"digits": None}
    else:
        columns = _dataset_column(source, data, ("label",))
    find = _by_row(columns)
    labels = data.labels if find is None else [find(name) for name in data.ids]
    if labels is None or None in labels:
        raise DataError(f"the images of '{source}' must have labels for --caption with {{label}}")
    return [str(label) for label in labels]


def _folder_of(name: str, source: str) -> str:
    folder = PurePosixPath(name).parent.name
    if not folder:
        raise DataError(
            f"'{name}' in '{source}' must lie in a folder named after its class for --caption with "
            "{label}"
        )
    return folder
