"""What the commands of `dtrak.store` do."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver, TopK
from dtrak_kernels.ridge.group import Group

from ..attribution import Attribution
from ..data.given import images
from ..data.samples import Samples
from ..features.imported import import_rows, open_dtrak, open_trak
from ..features.store import FeatureStore, StoreError, own_rows
from ..features.upkeep import describe, find_faults, name_some
from ..features.upkeep import merge as merge_shards
from ..methods.damping import Damping, damping_unit
from ..methods.scores import check_room
from ..pages.tables import values_table
from ..runs.choices import counted
from ..runs.console import progress_bar
from ..runs.files import encode_tensors, encode_text, write_atomically
from ..runs.ranks import ranks
from .store import DTRAK, ImportOptions, ScoreOptions


def show(folder: str) -> None:
    """Print what a store holds."""
    values_table("", list(describe(FeatureStore.read(folder)).items())).show(Console())


def check_store(folder: str, console: Console) -> None:
    """Print what is wrong with a store, shard by shard.

    Raises:
        StoreError: anything is.
    """
    store = FeatureStore.read(folder)
    with progress_bar(console, "check") as progress:
        faults = find_faults(store, progress)
    for name, fault in faults.items():
        Console().print(f"{name}: {fault}", highlight=False, soft_wrap=True, markup=False)
    shards = counted(store.num_shards, "shard")
    if faults:
        are = "is" if store.num_shards == 1 else "are"
        raise StoreError(
            f"{store.folder}: {len(faults)} of {shards} {are} missing or damaged: "
            f"{name_some(list(faults))}"
        )
    console.print(f"{store.folder}: {shards}, nothing is wrong", highlight=False)


def merge_stores(target: str, sources: list[str], console: Console) -> None:
    """Merge, and say what is still missing."""
    with progress_bar(console, "merge") as progress:
        store = merge_shards(Path(target), [Path(source) for source in sources], progress)
    _say_what_is_there(store, console)


def import_store(options: ImportOptions, console: Console) -> None:
    """Import, and say what is there."""
    if options.format == DTRAK:
        assert options.width is not None
        parts = open_dtrak(options.sources, options.width)
    else:
        parts = [open_trak(options.sources[0], options.model, options.experiment)]
    with progress_bar(console, "import") as progress:
        store = import_rows(
            Path(options.output),
            parts,
            options.format,
            dtype=options.store_dtype,
            progress=progress,
        )
    _say_what_is_there(store, console)


def _say_what_is_there(store: FeatureStore, console: Console) -> None:
    missing = [store.file(shard).name for shard in store.missing()]
    left = f", without {name_some(missing)}" if missing else ""
    console.print(
        f"{store.folder}: {store.count():,} of {len(store):,} rows{left}",
        highlight=False,
        soft_wrap=True,
    )


def score_stores(options: ScoreOptions, console: Console) -> None:
    """Score a store of queries against one of training samples, alone or with other processes."""
    train, queries = FeatureStore.read(options.train), FeatureStore.read(options.queries)
    missing = [train.file(shard).name for shard in train.missing()]
    if missing:
        raise StoreError(f"{train.folder} must be complete, got it without {name_some(missing)}")
    if train.shape[1] != queries.shape[1]:
        raise StoreError(
            f"{queries.folder} must hold rows of {train.shape[1]} features, as {train.folder} "
            f"does, got {queries.shape[1]}"
        )
    if options.only_top is None:
        check_room(len(queries), len(train), f"--only-top {min(100, len(train))}")
    shown = _images(options, len(train), len(queries))
    here = ranks()
    with progress_bar(console, "kernel inverse and scores"):
        group = here.group()
        solver = RidgeSolver(own_rows(train, here), group=group)
        asked = Damping.parse(options.damping)
        damping, unit = asked.resolve(solver), damping_unit(solver)
        left = queries.load()
        if options.only_top is not None:
            best = solver.top_k(left, options.only_top, damping)
        else:
            scores = Group(group).join_columns(solver.scores(left, damping))
    if not here.is_main:
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "method": "d-trak",
        "damping": f"{damping:.6g}" + (" (auto)" if asked.value is None else ""),
        "damping in mean squared feature norms": f"{damping / unit:.4g}x",
        "features of training images": train.manifest["settings"],
        "features of queries": queries.manifest["settings"],
    }
    if options.only_top is not None:
        file = _write_top(output, best, train, queries.ids)
    else:
        names = queries.ids, train.ids
        file = Attribution(scores, *shown, settings, names=names).save(output)
        if options.data is not None:
            found = Attribution(scores, *shown, settings)
            console.print(f"report: {found.report(output / 'report.html')}", highlight=False)
    console.print(f"scores: {file}", highlight=False, soft_wrap=True)


def _images(
    options: ScoreOptions, num_train: int, num_queries: int
) -> tuple[Samples | None, Samples | None]:
    """The images that are shown, as many as there are rows."""
    if options.data is None:
        return None, None
    train, pictures = images(options.data), images(options.pictures)
    for name, found, count in (("data", train, num_train), ("pictures", pictures, num_queries)):
        if len(found) != count:
            raise ValueError(
                f"--{name} must hold {count} images, one for each row, got {len(found)}"
            )
    return train, pictures


def _write_top(output: Path, best: TopK, train: FeatureStore, query_ids: Sequence[str]) -> Path:
    """``top.csv`` for a reader and ``top.safetensors`` for a program; the former is returned."""
    tensors: dict[str, Tensor] = {
        field.name: getattr(best, field.name).contiguous() for field in fields(best)
    }
    write_atomically(output / "top.safetensors", encode_tensors(tensors, {}))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["query", "kind", "rank", "training image", "score"])
    chosen = torch.cat([best.proponents, best.opponents]).unique().tolist()
    ids = dict(zip(chosen, train.ids_of(chosen), strict=True))
    for query, name in enumerate(query_ids):
        for kind in ("proponent", "opponent"):
            rows: list[Any] = tensors[f"{kind}s"][query].tolist()
            values = tensors[f"{kind}_scores"][query].tolist()
            for rank, (row, value) in enumerate(zip(rows, values, strict=True), start=1):
                writer.writerow([name, kind, rank, ids[row], f"{value:.9g}"])
    file = output / "top.csv"
    write_atomically(file, encode_text(text.getvalue()))
    return file
