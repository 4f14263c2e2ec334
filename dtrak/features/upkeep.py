"""Stores of features as files: what is in one, what is wrong with one, several joined into one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..runs.files import write_atomically
from ..runs.folders import describe_differences
from ..runs.measure import format_bytes
from .packing import pack, packed_bytes
from .store import MANIFEST, FeatureStore, StoreError

Progress = Callable[[int, int], None]
# of shards, in one line
_NAMED = 5


def describe(store: FeatureStore) -> dict[str, str]:
    """What a store holds, as name and text."""
    N, K = store.shape
    made = store.num_shards - len(store.missing())
    whole = N * packed_bytes(K, store.dtype)
    size = sum(file.stat().st_size for file in store.folder.glob("*.safetensors"))
    settings = {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in store.manifest["settings"].items()
    }
    return {
        "rows": f"{N:,} of {K:,} features",
        "kept as": store.dtype,
        "shards": f"{made:,} of {store.num_shards:,}, {store.rows_per_shard} rows each",
        "on disk": f"{format_bytes(size)} of {format_bytes(whole)}",
        "batch size": str(store.batch_size),
        **{name: _shorten(str(value)) for name, value in settings.items()},
    }


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}"


def find_faults(store: FeatureStore, progress: Progress | None = None) -> dict[str, str]:
    """What is wrong with the shards of a store, by the names of their files; all of it is read.

    Args:
        store: of which nothing is changed.
        progress: called with (shards read, shards).
    """
    found: dict[str, str] = {}
    for shard in range(store.num_shards):
        file = store.file(shard)
        fault = _fault(store, shard)
        if fault is not None:
            found[file.name] = fault
        if progress is not None:
            progress(shard + 1, store.num_shards)
    return found


def _fault(store: FeatureStore, shard: int) -> str | None:
    file, rows = store.file(shard), store.rows(shard)
    count = rows.stop - rows.start
    if not file.is_file():
        begun = len(store.begun(shard))
        return f"missing, {begun} of its {count} rows are kept" if begun else "missing"
    # of rows that are there: names, shapes and types without a value
    wanted = pack(torch.zeros(1, store.shape[1]), store.dtype)
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"cut or damaged: {' '.join(str(error).split())}"
    if found.keys() != wanted.keys():
        return f"must hold {', '.join(wanted)}, got {', '.join(found) or 'nothing'}"
    for name, tensor in found.items():
        shape, dtypes = (count, *wanted[name].shape[1:]), {wanted[name].dtype}
        if wanted[name].dtype == torch.float32:
            # double precision is kept as it is
            dtypes.add(torch.float64)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            return f"{name} must be {wanted[name].dtype} {shape}, got {got}"
        is_whole = not tensor.is_floating_point() or torch.isfinite(tensor).all(1)
        if is_whole is not True and not bool(is_whole.all()):
            row = rows.start + int((~is_whole).nonzero()[0])
            return f"{name} must be finite, got NaN or infinity in row {row}"
    try:
        store.ids_of_shard(shard)
    except StoreError as error:
        return f"the names of its rows: {error}"
    return None


def name_some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def merge(target: Path, sources: Sequence[Path], progress: Progress | None = None) -> FeatureStore:
    """Bring the shards of several stores together that were made with the same settings.

    Args:
        target: a store, or a folder that becomes one; what it has stays.
        sources: folders of stores; nothing in them is changed.
        progress: called with (shards looked at, shards).

    Returns:
        The target, which may still lack shards.

    Raises:
        StoreError: a folder holds no store, or one made with other settings (what differs); two
            have a shard that differs; or a shard is damaged.
    """
    stores = [FeatureStore.read(source) for source in sources]
    if not stores:
        raise StoreError("merge must be given one store or more beside the target, got none")
    first = stores[0]
    if not MANIFEST.is_in(target):
        layout = {key: value for key, value in first.manifest.items() if key not in _OURS}
        MANIFEST.claim(target, first.manifest["settings"], also=layout)
    joined = FeatureStore.read(target)
    for store in stores:
        differing = describe_differences(_compared(joined), _compared(store))
        if differing:
            raise StoreError(
                f"{store.folder} must be made as {target}, but is of other features: {differing}"
            )
    for shard in range(joined.num_shards):
        for store in stores:
            _take(joined, store, shard)
        if progress is not None:
            progress(shard + 1, joined.num_shards)
    return joined


# what a manifest says beside the layout of a store
_OURS = ("format", "settings")


def _compared(store: FeatureStore) -> dict[str, Any]:
    return {
        **store.manifest["settings"],
        **{k: v for k, v in store.manifest.items() if k not in _OURS},
    }


def _take(target: FeatureStore, source: FeatureStore, shard: int) -> None:
    file, place = source.file(shard), target.file(shard)
    if not file.is_file():
        return
    fault = _fault(source, shard)
    if fault is not None:
        raise StoreError(f"{file} cannot be used: {fault}")
    content = file.read_bytes()
    if not place.is_file():
        write_atomically(place, content)
    elif place.read_bytes() != content:
        raise StoreError(
            f"{file} must be the shard that {place} is, got other rows: delete the wrong one"
        )
