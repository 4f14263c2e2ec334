"""Which files of a folder are its images or tables, and which are left out, and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
TABLE_SUFFIX = ".parquet"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# what file managers, archives and file systems put beside files
_NOT_DATA = (
    "__macosx", "@eadir", "__pycache__", "$recycle.bin", "#recycle", "lost+found", "thumbnails",
)  # fmt: skip
_COMPANIONS = (
    "thumbs.db",
    "desktop.ini",
    "readme",
    "license",
    "settings.json",
    "drawn_by.json",
    *METADATA,
)
_PARTS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "valset"),
    "test": ("test", "testing", "eval", "testset"),
}
_SHOWN = 6
_SHARD = re.compile(r"(?P<stem>.*?)-?(?P<number>\d{2,})-of-(?P<total>\d{2,})(-[0-9a-f]+)?")


class DataError(ValueError):
    """Images that cannot be used as they are; the message says which and why, in one line."""


@dataclass
class Walk:
    """What was found below a folder.

    Attributes:
        folder: that was walked.
        images: (path relative to it, path) of each image, in the order of these paths.
        tables: the parquet files, likewise.
        metadata: the files of captions, likewise.
        parts: folders that hold one part of the data each and were taken, relative to it.
        left_out: what was not taken, in words.
    """

    folder: Path
    images: list[tuple[str, Path]] = field(default_factory=list)
    tables: list[tuple[str, Path]] = field(default_factory=list)
    metadata: list[tuple[str, Path]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def split_names(split: str) -> tuple[str, ...]:
    """What a part may be called where it lies, in order of preference."""
    if split == "validation":
        # the held-out part goes by several names; the first that is there counts
        return (*_PARTS["validation"], *_PARTS["test"])
    return _PARTS.get(split, (split,))


def part_of(name: str, *, loosely: bool = False) -> str | None:
    """The part whose name a folder or file has, or, loosely, holds as a word: ``seg_train``."""
    words = _words(name) if loosely else [name.lower()]
    return next((part for part, names in _PARTS.items() if set(words) & set(names)), None)


def _words(name: str) -> list[str]:
    """``seg_train``, ``trainA`` and ``train2017`` hold the word ``train``."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


def walk(folder: Path, split: str | None = None) -> Walk:
    """Find the images and tables below a folder; links are followed, each folder taken once.

    Folders ``train`` and ``validation`` (or what `split_names` lists) beside each other, anywhere,
    are parts: only those of ``split`` are taken. Hidden files and folders are left out.

    Args:
        folder: where to begin.
        split: the part wanted; None takes all, whatever folders are called.

    Raises:
        ValueError: there are parts, and none of that name.
        DataError: it cannot be told whether a folder is a part.
    """
    found = _Walker(folder, split)
    found.enter(folder, "")
    return found.finish()


class _Walker:
    def __init__(self, folder: Path, split: str | None) -> None:
        self.split = split
        self.walk = Walk(folder)
        self._seen: set[tuple[int, int]] = set()
        # links after what is no link: a folder is called by its own name where it has one here
        self._links: list[tuple[Path, str]] = []
        self._others: Counter[str] = Counter()
        self._hidden: Counter[str] = Counter()
        self._broken: list[str] = []
        self._again: list[str] = []
        self._outside: Counter[str] = Counter()

    def enter(self, folder: Path, name: str) -> None:
        """Walk one folder, called ``name`` relative to the first, and its links at the end."""
        self._visit(folder, name)
        while self._links:
            self._visit(*self._links.pop(0))

    def _visit(self, folder: Path, name: str) -> None:
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in self._seen:
            self._again.append(name)
            return
        self._seen.add((stat.st_dev, stat.st_ino))
        files, folders = self._list(folder, name)
        chosen = folders if self.split is None else self._choose(name, files, folders)
        if chosen is folders:
            for file in files:
                self._take(file, name)
        for child in folders:
            below = f"{name}/{child.name}" if name else child.name
            if child not in chosen:
                self._outside[below] = _count_images(child)
            elif child.is_symlink():
                self._links.append((child, below))
            else:
                self._visit(child, below)

    def _list(self, folder: Path, name: str) -> tuple[list[Path], list[Path]]:
        files, folders = [], []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path, below = Path(entry.path), f"{name}/{entry.name}" if name else entry.name
            is_hidden = entry.name.startswith(".") or entry.name.lower() in _NOT_DATA
            if entry.is_dir():
                if is_hidden:
                    self._hidden[f"{below}/"] += _count_images(path)
                else:
                    folders.append(path)
            elif entry.is_symlink() and not path.exists():
                self._broken.append(below)
            elif is_hidden:
                # a leading dot marks the resource forks some archives carry: not images
                self._hidden[below] += _is_image(entry.name)
            elif entry.is_file():
                files.append(path)
        return files, folders

    def _choose(self, name: str, files: Sequence[Path], folders: list[Path]) -> list[Path]:
        """The folders that are of the part asked for, or all of them."""
        parts = {child: part_of(child.name) for child in folders}
        named = [child for child in folders if parts[child] is not None]
        loose = {child: part_of(child.name, loosely=True) for child in folders}
        pictures = [file for file in files if _is_image(file.name)]
        if {"train"} < {parts[child] for child in named}:
            # beside each other: what lies in neither is of no part
            if pictures:
                self._outside[f"{name}/" if name else "the folder itself"] = len(pictures)
        elif (
            folders
            and not pictures
            and None not in loose.values()
            and ({"train"} < set(loose.values()))
        ):
            parts = loose
        elif not named or name:
            return folders
        elif pictures or len(named) < len(folders):
            others = [child.name for child in folders if child not in named]
            beside = ", ".join([*others[:_SHOWN], *(["images"] if pictures else [])])
            raise DataError(
                f"'{self.walk.folder}' holds '{named[0].name}' beside {beside}, which may be a "
                f"part of the data or a class: name the folder that is meant, such as "
                f"'{named[0]}', or call it otherwise"
            )
        wanted = split_names(str(self.split))
        for each in wanted:
            found = [c for c in folders if parts[c] and each in _words(c.name)]
            if found:
                self.walk.parts += [c.relative_to(self.walk.folder).as_posix() for c in found]
                return found
        if name:
            return []
        raise ValueError(
            f"'{self.walk.folder}' must have a folder {' or '.join(wanted)} for the split "
            f"'{self.split}', got {', '.join(child.name for child in folders)}"
        )

    def _take(self, file: Path, name: str) -> None:
        below = f"{name}/{file.name}" if name else file.name
        lower = file.name.lower()
        if _is_image(lower):
            self.walk.images.append((below, file))
        elif lower in METADATA:
            self.walk.metadata.append((below, file))
        elif lower.endswith(TABLE_SUFFIX):
            self.walk.tables.append((below, file))
        elif not lower.startswith(_COMPANIONS) and not lower.endswith(".partial"):
            self._others[file.suffix.lower() or "without a suffix"] += 1

    def finish(self) -> Walk:
        """What was found, and in words what was not taken."""
        for listed in (self.walk.images, self.walk.tables, self.walk.metadata):
            listed.sort()
        outside = {name: count for name, count in self._outside.items() if count}
        hidden = {name: count for name, count in self._hidden.items() if count}
        self.walk.left_out = [
            *(_counted(outside, "in another part or none") if outside else ()),
            *(_counted(hidden, "hidden, or no data by its name") if hidden else ()),
            *(_named(self._again, "the same folder again, or one above it") if self._again else ()),
            *(_named(self._broken, "a link to nothing") if self._broken else ()),
        ]
        if self._others:
            kinds = [f"{count} {suffix}" for suffix, count in self._others.most_common(_SHOWN)]
            more = len(self._others) - _SHOWN
            kinds += [f"{more} more kinds"] if more > 0 else []
            self.walk.left_out.append(f"{', '.join(kinds)} (no suffix of an image)")
        return self.walk


def _counted(counts: dict[str, int], why: str) -> Iterator[str]:
    shown = [f"{count:,} of {name}" for name, count in list(counts.items())[:_SHOWN]]
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    yield f"{', '.join(shown)}{more} ({why})"


def _named(names: Sequence[str], why: str) -> Iterator[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    yield f"{', '.join(names[:_SHOWN])}{more} ({why})"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _count_images(folder: Path) -> int:
    return sum(_is_image(file) for _, _, files in os.walk(folder) for file in files)


def class_folders(names: Sequence[str]) -> dict[str, int] | None:
    """Labels of the classes of ``<class>/<image>``; None where that is not how images lie.

    Folders that are all numbers are the labels, others are counted in the order of their names, as
    torchvision's and Hugging Face's readers do.

    Args:
        names: paths of images, relative to the folder of the classes.
    """
    above = {name.rpartition("/")[0] for name in names}
    if len(above) < 2 or any(not name or "/" in name for name in above):
        return None
    if all(re.fullmatch(r"\d+", name) for name in above):
        numbers = {name: int(name) for name in above}
        return numbers if len(set(numbers.values())) == len(numbers) else None
    return {name: label for label, name in enumerate(sorted(above))}


def check_shards(files: Sequence[Path]) -> None:
    """Refuse files of a set that names or counts its files, where one is missing.

    Raises:
        DataError: one is, or files of two sets lie together.
    """
    matches = {file: _SHARD.fullmatch(file.stem) for file in files}
    sets: dict[tuple[str, str], set[int]] = {}
    for match in matches.values():
        if match is not None:
            key = match["stem"], match["total"]
            number = int(match["number"])
            if number in sets.setdefault(key, set()):
                raise DataError(
                    f"'{files[0].parent}' must hold each file of a set once, got two that are "
                    f"{match['number']} of {match['total']}"
                )
            sets[key].add(number)
    stems = [stem for stem, _ in sets]
    if len(set(stems)) < len(stems):
        raise DataError(
            f"'{files[0].parent}' must hold files of one set, got some of "
            f"{' and some of '.join(total for _, total in sets)}"
        )
    for (stem, total), numbers in sets.items():
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            raise DataError(
                f"'{files[0].parent}' must hold all {int(total)} files of '{stem or 'the set'}', "
                f"got {len(numbers)}: number {missing[0]:0{len(total)}d} is missing"
            )
    counted = [int(file.stem) for file in files if re.fullmatch(r"\d{4,}", file.stem)]
    missing = sorted(set(range(max(counted, default=-1) + 1)) - set(counted))
    if missing:
        raise DataError(
            f"'{files[0].parent}' must hold all files up to {max(counted):04d}{TABLE_SUFFIX}, got "
            f"no {missing[0]:04d}{TABLE_SUFFIX}"
        )


def shard_of(file: Path) -> int | None:
    """How many files the set of one is said to have; None for a file that is no part of one."""
    match = _SHARD.fullmatch(file.stem)
    return None if match is None or int(match["total"]) < 2 else int(match["total"])
