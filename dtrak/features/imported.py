"""Features that were made elsewhere, as a store: TRAK's save folders, D-TRAK's memory maps.

    TRAK      <folder>/<model id>/grads.mmap  [N, K] float16 or float32, as NumPy's own format
              <folder>/<model id>/<experiment>_grads.mmap  [M, K], of what was scored
    D-TRAK    *.npy without a header: float32 [rows, K] one after the other, several files in order

TRAK's ``features.mmap`` are features times the inverse of their kernel matrix, no features.

Source:
    traker 0.3.2, ``trak/savers.py``; D-TRAK's gradient scripts at e2a0c2e.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from ..runs.choices import FLOAT32
from ..runs.files import expand_path
from .store import FeatureStore, StoreError

Progress = Callable[[int, int], None]
_GRADS, _DONE = "grads.mmap", "_is_featurized.mmap"


def open_trak(folder: str | Path, model: int = 0, experiment: str | None = None) -> np.ndarray:
    """What TRAK kept of a model, mapped, not read: features ``[rows, K]``.

    Args:
        folder: the ``save_dir`` of a ``TRAKer``.
        model: its ``model_id``.
        experiment: of the samples that were scored; None for the training samples.

    Raises:
        StoreError: there is nothing, or not all rows were made.
    """
    place = expand_path(folder) / str(model)
    file = place / (_GRADS if experiment is None else f"{experiment}_{_GRADS}")
    if not file.is_file():
        there = sorted(path.name for path in place.glob(f"*{_GRADS}")) if place.is_dir() else []
        raise StoreError(
            f"{file} must be there, as TRAK leaves it, got {', '.join(there) or 'nothing'}"
        )
    found = _mapped(file)
    if found.ndim != 2 or found.dtype not in (np.float16, np.float32):
        raise StoreError(
            f"{file} must be float16 or float32 [rows, K], got {found.dtype} {found.shape}"
        )
    if experiment is None and (place / _DONE).is_file():
        left = np.flatnonzero(np.asarray(_mapped(place / _DONE)) == 0)
        if len(left):
            raise StoreError(
                f"{file} must hold the features of all {len(found)} samples, got none of "
                f"{len(left)}, the first in row {left[0]}"
            )
    return found


def _mapped(file: Path) -> np.ndarray:
    try:
        return open_memmap(file, mode="r")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{file} must be a memory map of NumPy, got {reason}") from error


def open_dtrak(files: Sequence[str | Path], width: int) -> list[np.ndarray]:
    """What D-TRAK's scripts kept, mapped, not read: features ``[rows, K]`` of each file.

    Args:
        files: in the order of the training samples.
        width: K, which the files do not say.

    Raises:
        FileNotFoundError: a file is not there.
        StoreError: its size is no number of rows of that width.
    """
    found: list[np.ndarray] = []
    for file in map(expand_path, files):
        if not file.is_file():
            raise FileNotFoundError(f"features must be an existing file, got {file}")
        rows, rest = divmod(file.stat().st_size, 4 * width)
        if rest or not rows:
            raise StoreError(
                f"{file} must hold rows of {width} float32, got {file.stat().st_size} bytes, which "
                f"are {rows} rows and {rest} bytes: --width is K of the run that made it"
            )
        found.append(np.memmap(file, np.float32, "r", shape=(rows, width)))
    return found


def import_rows(
    folder: Path,
    parts: Sequence[np.ndarray],
    made_by: str,
    *,
    dtype: str = FLOAT32,
    progress: Progress | None = None,
) -> FeatureStore:
    """Copy features that lie in parts one after the other into a store.

    One that was interrupted goes on. Rows are named by their numbers.

    Args:
        folder: of the store; begun if nothing is there.
        parts: ``[rows, K]`` each, one K.
        made_by: what made them, for the manifest.
        dtype: what rows are kept as.
        progress: called with (rows done, rows).

    Raises:
        StoreError: the folder holds other features, the parts do not fit together, or a row is not
            finite.
    """
    widths = {part.shape[1] for part in parts}
    if len(widths) != 1:
        raise StoreError(f"features must be of one width in all files, got {sorted(widths)}")
    N = sum(len(part) for part in parts)
    settings: dict[str, Any] = {"imported from": made_by, "content": _hash(parts)}
    ids = [f"{row:0{len(str(N - 1))}d}" for row in range(N)]
    store = FeatureStore.open(folder, settings, ids, widths.pop(), 1, dtype)
    for shard in store.missing():
        rows = store.rows(shard)
        features = torch.from_numpy(_read(parts, rows.start, rows.stop))
        bad = ~torch.isfinite(features).all(1)
        if bad.any():
            row = rows.start + int(bad.nonzero()[0])
            raise StoreError(f"features must be finite, got NaN or infinity in row {row}")
        store.write(shard, features)
        if progress is not None:
            progress(rows.stop, N)
    return store


def _read(parts: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Rows ``start:stop`` of parts one after the other, float32."""
    found, first = [], 0
    for part in parts:
        chosen = part[max(start - first, 0) : max(stop - first, 0)]
        if len(chosen):
            found.append(np.array(chosen, np.float32))
        first += len(part)
    return np.concatenate(found)


def _hash(parts: Sequence[np.ndarray]) -> str:
    """SHA-256 of shapes and of all values, which tells an interrupted import from another one."""
    digest = hashlib.sha256(json.dumps([[*part.shape, str(part.dtype)] for part in parts]).encode())
    for part in parts:
        for first in range(0, len(part), 4096):
            digest.update(np.ascontiguousarray(part[first : first + 4096]).data)
    return digest.hexdigest()
