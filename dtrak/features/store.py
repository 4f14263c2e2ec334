"""Features ``[N, K]`` on disk: written shard by shard, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runs.files import write_atomically
from ..runs.folders import describe_differences

_FORMAT = 1
_ROWS_PER_SHARD = 64


class StoreError(ValueError):
    """A feature store that does not fit what is asked, or is damaged; the message says which."""


class Store(Protocol):
    """Features ``[N, K]``, filled shard by shard and read in contiguous slices."""

    ids: list[str]
    shape: tuple[int, int]
    batch_size: int

    def missing(self) -> list[int]:
        """Shards that are still to be computed."""
        ...

    def rows(self, shard: int) -> slice:
        """Rows of a shard."""
        ...

    def write(self, shard: int, features: Tensor) -> None:
        """Keep one shard, ``[rows of the shard, K]``."""
        ...

    def load(self) -> Tensor:
        """All features, ``[N, K]``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class StoreInMemory:
    """A `Store` that is gone with the process; its shards are those of one on disk.

    Args:
        ids: N sample ids.
        num_features: ``K``.
        batch_size: samples per batch.
    """

    def __init__(self, ids: Sequence[str], num_features: int, batch_size: int) -> None:
        self.ids, self.batch_size = list(ids), batch_size
        self.shape = (len(self.ids), num_features)
        self._step = _shard_rows(batch_size)
        self._features = torch.empty(self.shape)
        self._done: set[int] = set()

    def missing(self) -> list[int]:
        """See `Store.missing`."""
        return [n for n in range(-(-len(self) // self._step)) if n not in self._done]

    def rows(self, shard: int) -> slice:
        """See `Store.rows`."""
        return slice(shard * self._step, min((shard + 1) * self._step, len(self)))

    def write(self, shard: int, features: Tensor) -> None:
        """See `Store.write`."""
        # double precision stays what it is, as on disk
        if features.dtype != self._features.dtype:
            self._features = self._features.to(features.dtype)
        self._features[self.rows(shard)] = features
        self._done.add(shard)

    def load(self) -> Tensor:
        """See `Store.load`."""
        return self._features

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Features of a contiguous slice of rows, ``[rows, K]``."""
        return self._features[rows]


class FeatureStore:
    """Features ``[N, K]`` on disk: a manifest and shards, each written whole or not at all.

    Rows can be read in slices (``store[i:j]``), so nothing needs them in memory at once.

    Attributes:
        folder: where it lies.
        ids: N sample ids, the rows.
        shape: ``(N, K)``.
        rows_per_shard: rows of every shard but the last.
        batch_size: samples per batch the features were computed with.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.ids: list[str] = manifest["ids"]
        self.shape: tuple[int, int] = (len(self.ids), manifest["num_features"])
        self.rows_per_shard: int = manifest["rows_per_shard"]
        self.batch_size: int = manifest["batch_size"]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        deciding: dict[str, Any],
        ids: Sequence[str],
        num_features: int,
        batch_size: int,
    ) -> FeatureStore:
        """Open the store in ``folder``, or begin one.

        Args:
            folder: of the store.
            deciding: everything that decides the numbers; JSON-serialisable.
            ids: N sample ids.
            num_features: ``K``.
            batch_size: samples per batch of a new store; an existing one keeps its own.

        Raises:
            StoreError: the folder holds a store made with other settings (the keys are named), or
                its manifest is unreadable.
        """
        folder = Path(folder)
        file = folder / "manifest.json"
        wanted = json.loads(json.dumps(deciding))
        if file.is_file():
            try:
                manifest = json.loads(file.read_text())
                found = manifest["deciding"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{file} must be the manifest of a feature store, but is damaged: delete "
                    f"{folder} to compute the features again"
                ) from error
            differing = describe_differences(found, wanted)
            if differing:
                raise StoreError(
                    f"{folder} holds features made with other settings: {differing}. Choose "
                    "another --output, or delete that folder"
                )
            return cls(folder, manifest)
        manifest = {
            "format": _FORMAT,
            "deciding": wanted,
            "num_features": num_features,
            "rows_per_shard": _shard_rows(batch_size),
            "batch_size": batch_size,
            "ids": list(ids),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(manifest, indent=1).encode())
        return cls(folder, manifest)

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.shape[0] // self.rows_per_shard)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def rows(self, shard: int) -> slice:
        """Rows of a shard."""
        first = shard * self.rows_per_shard
        return slice(first, min(first + self.rows_per_shard, self.shape[0]))

    def missing(self) -> list[int]:
        """Shards that are still to be computed."""
        return [shard for shard in range(self.num_shards) if not self._file(shard).is_file()]

    def write(self, shard: int, features: Tensor) -> None:
        """Write one shard, ``[rows of the shard, K]``, atomically."""
        write_atomically(self._file(shard), save({"features": features.cpu().contiguous()}))

    def _read(self, shard: int) -> Tensor:
        file, rows = self._file(shard), self.rows(shard)
        if not file.is_file():
            raise StoreError(
                f"{self.folder} is incomplete: {file.name} is missing; run again to resume"
            )
        try:
            with safe_open(file, "pt") as opened:
                features: Tensor = opened.get_tensor("features")
        except (SafetensorError, OSError, KeyError) as error:
            raise StoreError(
                f"{file} is damaged ({' '.join(str(error).split())}): delete it and run again to "
                "compute its rows anew"
            ) from error
        expected = (rows.stop - rows.start, self.shape[1])
        if tuple(features.shape) != expected:
            raise StoreError(f"{file} must hold features {expected}, got {tuple(features.shape)}")
        return features

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Features of a contiguous slice of rows, ``[rows, K]``."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"a store is read in contiguous slices, got step {step}")
        parts = []
        for shard in range(start // self.rows_per_shard, -(-stop // self.rows_per_shard)):
            first = shard * self.rows_per_shard
            part = self._read(shard)
            parts.append(part[max(start - first, 0) : stop - first])
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])

    def load(self) -> Tensor:
        """All features, ``[N, K]``."""
        return self[:]


def _shard_rows(batch_size: int) -> int:
    """Rows of a shard: whole batches."""
    return batch_size * -(-_ROWS_PER_SHARD // batch_size)
