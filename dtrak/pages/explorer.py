"""What a page needs to be explored: every score it can hold, and what is known beside it."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..findings import Findings, Groups
from ..runs.files import encode_text
from .embedding import Embedded, embed
from .influence import captions_of, choose_exponent, classes_of
from .tables import Table

if TYPE_CHECKING:
    from ..data.samples import Samples
    from .report import Explained

# of a page, in millions of bytes; what scores and pictures of queries may take of it
MEGABYTES = 20.0
_SCORES, _QUERIES = 0.35, 0.15
_BINS = 61
# letters of a caption or a name that a page shows
_MOST_LETTERS = 300
# of classes, that every query has a total of
_MOST_CLASSES = 200
# classes and groups in a table of a page
_MOST_LINES = 40
TILES = """<label class="order">Sort by <select id="order">
<option value="share">share of the positive scores, mean over pictures</option>
<option value="serves">pictures it is foremost for</option>
<option value="name">name</option></select></label>
<ol class="strip" id="tiles"></ol>
<div id="tiles-more"></div>"""


@dataclass(frozen=True, eq=False)
class Explorer:
    """Letters: M queries, N training images, n of them in the page.

    Attributes:
        style: rules of the style sheet that are the pictures: ``q<row>`` and ``t<place>``.
        data: what the script reads, JSON that may stand in a page.
        places: of a column of the scores, its place among the n.
        exponent: of the power of ten in which scores are shown, one for the page.
        left_out: what is not in the page, in words, a sentence each.
    """

    style: str
    data: str
    places: dict[int, int]
    exponent: int
    left_out: tuple[str, ...]


def make_explorer(
    explained: Explained, scores: Tensor, needed: Collection[int], budget: int
) -> Explorer:
    """Gather what fits.

    The training images that are foremost for any query are taken first, on either side.

    Args:
        explained: what a page is about.
        scores: ``[M, N]`` float32, of the first M queries.
        needed: columns that must be among them.
        budget: bytes, at most.

    Raises:
        ValueError: a score is not finite.
    """
    M, N = scores.shape
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    size = _column_bytes(M, explained.findings)
    columns, depth = _choose_columns(scores, needed, int(budget * _SCORES) // size)
    exponent = choose_exponent([float(scores.abs().max())] if scores.numel() else [])
    content = {"exponent": exponent, **_describe(explained, scores, columns, depth)}
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    left = budget - len(encode_text(data))
    queries = embed(explained.queries, range(M), "q", min(left, int(budget * _QUERIES)))
    train = embed(explained.train, columns, "t", left - len(queries.style))
    data = data.replace('"pictures":0', f'"pictures":[{queries.count},{train.count}]', 1)
    said = tuple(_left_out(explained, M, N, len(columns), depth, queries, train))
    places = {column: place for place, column in enumerate(columns)}
    return Explorer(f"{queries.style}\n{train.style}", data, places, exponent, said)


def _column_bytes(M: int, found: Findings | None) -> int:
    """What a training image takes without its picture: its scores, what is known, its name."""
    size = 4.0
    if found is not None:
        size += 2 * (found.errors is not None) + 2 * (found.p_values is not None)
        size += (found.stands_out is not None) / 8
    return int(M * size * 4 / 3) + 60


def _choose_columns(
    scores: Tensor, needed: Collection[int], most: int
) -> tuple[list[int], int | None]:
    """Columns of training images, the foremost of any query first.

    Returns:
        Columns, and how many of the first of every query and side are all among them; None where
        all columns are.
    """
    M, N = scores.shape
    if not M or not N:
        return list(range(N)), None
    foremost, places = torch.full((N,), N), torch.arange(N)
    for row in scores:
        # from either end; scores that are equal keep the order of the columns
        for signed in (-row, row):
            ranks = torch.empty_like(places)
            ranks[signed.argsort(stable=True)] = places
            foremost = torch.minimum(foremost, ranks)
    foremost[list(needed)] = 0
    order = foremost.argsort(stable=True)
    count = min(N, max(most, int((foremost == 0).sum())))
    depth = None if count == N else int(foremost[order[count]])
    return order[:count].tolist(), depth


def _describe(
    explained: Explained, scores: Tensor, columns: Sequence[int], depth: int | None
) -> dict[str, Any]:
    """All that the script reads."""
    M, N = scores.shape
    train, queries, found = explained.train, explained.queries, explained.findings or Findings()
    classes, captions = classes_of(train), captions_of(train)
    asked, kinds = captions_of(queries), classes_of(queries)
    names = sorted(set(classes), key=_natural) if classes is not None else []
    numbers = {name: number for number, name in enumerate(names)}
    known = classes or []
    groups = found.groups
    return {
        "pictures": 0,
        "kind": explained.query_kind,
        "total": N,
        "depth": depth,
        "shown": explained.top_k,
        "queries": {
            "ids": [_text(name) for name in queries.ids[:M]],
            "captions": None if asked is None else [_text(text) for text in asked[:M]],
            "labels": None if kinds is None else [_text(name) for name in kinds[:M]],
            "verdicts": None if found.verdicts is None else list(found.verdicts[:M]),
        },
        "train": {
            "ids": [_text(train.ids[column]) for column in columns],
            "labels": None if classes is None else [numbers[known[c]] for c in columns],
            "captions": None if captions is None else [_text(captions[c]) for c in columns],
        },
        "classes": [_text(name) for name in names],
        "scores": _pack(scores, columns, "<f4"),
        # against the strongest score of their row, as half a float has little range
        "errors": None
        if found.errors is None
        else _pack(found.errors[:M] / strongest(scores)[:, None], columns, "<f2"),
        "p": _pack(found.p_values, columns, "<f2", M),
        "out": _pack_bits(found.stands_out, columns, M),
        "alike": _describe_alike(found, columns, M),
        "groups": None if groups is None else _describe_groups(groups, columns, M),
        "totals": None if classes is None else _class_shares(scores, classes, names),
        "histograms": [
            _histogram(row, None if found.errors is None else found.errors[m])
            for m, row in enumerate(scores)
        ],
    }


def strongest(scores: Tensor) -> Tensor:
    """The largest size of a score of every query, ``[M]``; 1 where all are 0."""
    largest = scores.abs().amax(1) if scores.shape[1] else scores.new_zeros(len(scores))
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _natural(name: str) -> tuple[str, int]:
    """``label 10`` after ``label 9``."""
    head, _, tail = name.rpartition(" ")
    return (head, int(tail)) if tail.isdigit() else (name, 0)


def _text(text: str) -> str:
    """As a reader is shown it, and not longer than a page should carry."""
    text = encode_text(text).decode()
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def _pack(
    values: Tensor | None, columns: Sequence[int], dtype: str, rows: int | None = None
) -> Any:
    """``[M, n]`` little-endian in base 64, row by row."""
    if values is None:
        return None
    limit = torch.finfo(torch.float16).max if dtype == "<f2" else torch.inf
    chosen = values[:rows][:, list(columns)].clamp(-limit, limit).cpu().numpy().astype(dtype)
    return base64.b64encode(chosen.tobytes()).decode()


def _pack_bits(values: Tensor | None, columns: Sequence[int], rows: int) -> Any:
    """``[M, n]`` of single bits, the lowest first, likewise."""
    if values is None:
        return None
    chosen = values[:rows][:, list(columns)].cpu().numpy()
    return base64.b64encode(np.packbits(chosen, bitorder="little").tobytes()).decode()


def _describe_alike(found: Findings, columns: Sequence[int], M: int) -> dict[str, Any] | None:
    if found.look_alikes is None:
        return None
    places = {column: place for place, column in enumerate(columns)}
    # -1 is one that is not in the page
    rows = [[places.get(c, -1) for c in row] for row in found.look_alikes[:M].tolist()]
    return {"by": found.likeness, "places": rows}


def _describe_groups(groups: Groups, columns: Sequence[int], M: int) -> dict[str, Any]:
    errors = groups.errors
    members = None if groups.members is None else groups.members[list(columns)].tolist()
    return {
        "names": [_text(name) for name in groups.names],
        "sizes": list(groups.sizes),
        "scores": _rounded(groups.scores[:M]),
        "shares": _rounded(groups.shares[:M]),
        "errors": None if errors is None else _rounded(errors[:M]),
        "members": members,
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def class_shares(scores: Tensor, classes: Sequence[str], names: Sequence[str]) -> Tensor:
    """Of every query, the share of its positive scores that each class has, ``[M, G]``."""
    numbers = {name: number for number, name in enumerate(names)}
    column = torch.tensor([numbers[name] for name in classes])
    mass = scores.double().clamp(min=0)
    total = mass.new_zeros(len(scores), len(names)).index_add_(1, column, mass)
    return total / mass.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _class_shares(scores: Tensor, classes: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Shares of the classes with the largest ones."""
    shares = class_shares(scores, classes, names)
    kept = shares.sum(0).argsort(descending=True, stable=True)[:_MOST_CLASSES]
    sizes = Counter(classes)
    return {
        "classes": kept.tolist(),
        "sizes": [sizes[names[number]] for number in kept.tolist()],
        "shares": _rounded(shares[:, kept]),
    }


def _histogram(scores: Tensor, errors: Tensor | None) -> dict[str, Any]:
    """Counts of a query's scores between its lowest and its highest, and their usual error."""
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    # of equal scores there is one bar
    counts = torch.histc(scores.double(), _BINS, low, high) if high > low else torch.zeros(_BINS)
    noise = None if errors is None else float(errors.double().square().mean().sqrt())
    return {"low": low, "high": high, "counts": counts.int().tolist(), "noise": noise}


def _left_out(
    explained: Explained,
    M: int,
    N: int,
    n: int,
    depth: int | None,
    queries: Embedded,
    train: Embedded,
) -> list[str]:
    """What is not in the page, a sentence each."""
    kind, said = explained.query_kind, []
    if len(explained.scores) > M:
        said.append(f"The first {M:,} of {len(explained.scores):,} {kind}s are here.")
    if depth is not None:
        said.append(
            f"Of {N:,} training images, the {n:,} that are foremost for any {kind} are here: of "
            f"each {kind}, the first {depth:,} proponents and opponents. Totals and histograms are "
            "over all."
        )
    if train.count < n:
        said.append(f"{n - train.count:,} of these have no picture here.")
    if queries.count < M:
        said.append(f"{M - queries.count:,} {kind}s have no picture here.")
    for embedded, what in ((queries, f"{kind}s"), (train, "training images")):
        if embedded.note:
            said.append(f"Pictures of {what} are {embedded.note}.")
    return said


def render_tools() -> str:
    """The form that filters and sorts, which needs the script."""
    return """<form class="tools" id="tools" data-scripted hidden aria-label="Filter and sort">
<label>Pictures <input type="search" name="query" placeholder="name or caption"></label>
<label>Sorted by <select name="sort"><option value="">as given</option>
<option value="name">name</option>
<option value="concentration">share of the first five</option></select></label>
<label>Training images <input type="search" name="text" placeholder="name, label, caption"></label>
<label>Label <select name="label"><option value="">all</option></select></label>
<label>Group <select name="group"><option value="">all</option></select></label>
<label>Scores <select name="sure"><option value="">all</option></select></label>
<label>Shown <select name="count"></select></label>
<label>Size <input type="range" name="size" min="40" max="200" value="84"></label>
<button type="reset">Reset</button>
<button type="button" id="export">Export CSV</button>
<output id="found"></output>
</form>"""


def class_table(train: Samples, scores: Tensor) -> Table | None:
    """What each class has of the positive scores; None for fewer than two.

    Args:
        train: N training images.
        scores: ``[M, N]``.
    """
    classes = classes_of(train)
    if classes is None or len(set(classes)) < 2 or not len(scores):
        return None
    sizes = Counter(classes)
    names = sorted(sizes, key=_natural)
    shares = class_shares(scores, classes, names).mean(0).tolist()
    return _shares_table("Class", names, [sizes[name] for name in names], shares, len(classes))


def group_table(groups: Groups) -> Table:
    """What each group has of them, likewise."""
    shares, total = groups.shares.double().mean(0).tolist(), sum(groups.sizes)
    return _shares_table("Group", groups.names, groups.sizes, shares, total)


def _shares_table(
    head: str, names: Sequence[str], sizes: Sequence[int], shares: Sequence[float], total: int
) -> Table:
    best = sorted(range(len(names)), key=lambda g: -shares[g])[:_MOST_LINES]
    rows = [
        (
            encode_text(names[g]).decode(),
            f"{sizes[g]:,}",
            f"{100 * sizes[g] / max(total, 1):.1f} %",
            f"{100 * shares[g]:.1f} %",
        )
        for g in best
    ]
    note = "Mean over the pictures of each one's share; chance is the share of the images."
    if len(best) < len(names):
        note += f" The first {len(best)} of {len(names):,}."
    columns = (head, "Images", "Share of the images", "Share of the positive scores")
    return Table(columns, rows, note=note)
