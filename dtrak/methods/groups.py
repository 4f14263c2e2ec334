"""Scores of groups of training images: artists, classes, sources, or whatever a table says."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..data.samples import Samples
from ..findings import Groups
from ..runs.choices import GROUPS
from ..runs.files import expand_path
from .errors import ScoreNoise

By = str | Path | Mapping[str, str] | Sequence[str]


def group_names(train: Samples, by: By) -> list[str | None]:
    """The group of every training image, None for none.

    Args:
        train: N training images.
        by: one of `choices.GROUPS`; a CSV file of lines ``image,group`` below a line of heads, the
            image as its id; a mapping from ids; or N names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the images have no labels, folders or captions; or what is given names images
            that are not there, one twice, or not N.
    """
    if isinstance(by, str | Path):
        if by in GROUPS:
            return list(_of_images(train, str(by)))
        by = _read(expand_path(by))
    if isinstance(by, Mapping):
        unknown = set(by) - set(train.ids)
        if unknown:
            raise ValueError(
                f"--groups must name training images, got {min(unknown)!r} and "
                f"{len(unknown) - 1:,} others that are none; one is called {train.ids[0]!r}"
            )
        return [by.get(name) for name in train.ids]
    if len(by) != len(train):
        raise ValueError(f"groups must be {len(train)}, one for each image, got {len(by)}")
    return [str(name) for name in by]


def _of_images(train: Samples, kind: str) -> Sequence[str]:
    if kind == "folder":
        names = [str(PurePosixPath(name).parent) for name in train.ids]
        if len(set(names)) > 1:
            return names
    elif kind == "label" and train.classes is not None:
        return [str(name) for name in train.classes]
    elif train.conditions is not None and isinstance(train.conditions[0], str):
        return list(train.conditions)
    got = "all in one" if kind == "folder" else "none"
    raise ValueError(f"--groups {kind} must have training images with {kind}s, got {got}")


def _read(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise FileNotFoundError(f"--groups must be {', '.join(GROUPS)} or a CSV file, got {file}")
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        lines = [line for line in csv.reader(opened) if line][1:]
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=2):
        if len(line) != 2 or line[0] in found:
            what = "an image again" if len(line) == 2 else f"{len(line)} columns"
            raise ValueError(
                f"{file} must hold lines image,group, each image once, got {what} as entry "
                f"{number}: {','.join(line)[:60]!r}"
            )
        found[line[0]] = line[1]
    if not found:
        raise ValueError(f"{file} must hold lines image,group below a line of heads, got none")
    return found


def score_groups(
    scores: Tensor, names: Sequence[str | None], noise: ScoreNoise | None = None
) -> Groups:
    """Sums of scores by group, the largest groups first.

    Args:
        scores: ``[M, N]``.
        names: N groups, None for images in none.
        noise: of the scores; None leaves errors out.
    """
    counts: dict[str, int] = {}
    for name in names:
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    place = {name: column for column, name in enumerate(ordered)}
    members = torch.zeros(len(names), len(ordered), dtype=torch.bool)
    columns = torch.tensor([-1 if name is None else place[name] for name in names])
    members[columns >= 0, columns[columns >= 0]] = True
    inside, positive = members.double(), scores.double().clamp(min=0)
    mass = positive.sum(1, keepdim=True)
    shares = torch.where(mass > 0, positive @ inside / mass.clamp(min=1e-300), 0.0)
    return Groups(
        tuple(ordered),
        tuple(counts[name] for name in ordered),
        (scores.double() @ inside).float(),
        shares.float(),
        None if noise is None else noise.group_errors(members),
        columns,
    )
