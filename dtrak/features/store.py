"""Features ``[N, K]`` on disk: written shard by shard, so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runs.files import write_atomically
from ..runs.folders import Record

# of a shard, whatever the batch size
_ROWS_PER_SHARD, _BYTES_PER_SHARD = 512, 2**28
# rows after which a shard that is being made is kept as far as it has come
ROWS_PER_PART = 64


class StoreError(ValueError):
    """A feature store that does not fit what is asked, or is damaged; the message says which."""


MANIFEST = Record("manifest.json", "features made with other settings", StoreError, format=2)


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

    def begun(self, shard: int) -> Tensor:
        """The first rows of a missing shard, as far as they are kept, ``[rows, K]``."""
        ...

    def keep(self, shard: int, first: int, features: Tensor) -> None:
        """Keep rows of a missing shard, ``[rows, K]``, from its row ``first`` on."""
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
        self._step = _shard_rows(num_features)
        self._features = torch.empty(self.shape)
        self._done: set[int] = set()

    def missing(self) -> list[int]:
        """See `Store.missing`."""
        return [n for n in range(-(-len(self) // self._step)) if n not in self._done]

    def rows(self, shard: int) -> slice:
        """See `Store.rows`."""
        return slice(shard * self._step, min((shard + 1) * self._step, len(self)))

    def begun(self, shard: int) -> Tensor:
        """See `Store.begun`."""
        return torch.empty(0, self.shape[1])

    def keep(self, shard: int, first: int, features: Tensor) -> None:
        """See `Store.keep`: nothing goes on after this process."""

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
        layout = {
            "num_features": num_features,
            "rows_per_shard": _shard_rows(num_features),
            "batch_size": batch_size,
            "ids": list(ids),
        }
        return cls(folder, MANIFEST.claim(folder, deciding, also=layout))

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

    def begun(self, shard: int) -> Tensor:
        """See `Store.begun`."""
        found, first = [torch.empty(0, self.shape[1])], 0
        while (file := self._part(shard, first)).is_file():
            found.append(self._load(file, slice(None)))
            first += len(found[-1])
        # double precision stays what it is
        return torch.cat(found[1:] or found)

    def keep(self, shard: int, first: int, features: Tensor) -> None:
        """See `Store.keep`."""
        self._write(self._part(shard, first), features)

    def write(self, shard: int, features: Tensor) -> None:
        """Write one shard, ``[rows of the shard, K]``, atomically."""
        self._write(self._file(shard), features)
        for part in self.folder.glob(self._part(shard, "*").name):
            part.unlink()

    def _part(self, shard: int, first: int | str) -> Path:
        return self.folder / f"{shard:06d}-from-{first}.safetensors"

    def _write(self, file: Path, features: Tensor) -> None:
        write_atomically(file, save({"features": features.cpu().contiguous()}))

    def _read(self, shard: int, rows: slice) -> Tensor:
        """Some rows of a shard, and no more than these."""
        file, whole = self._file(shard), self.rows(shard)
        if not file.is_file():
            raise StoreError(
                f"{self.folder} is incomplete: {file.name} is missing; run again to resume"
            )
        return self._load(file, rows, whole.stop - whole.start)

    def _load(self, file: Path, rows: slice, length: int | None = None) -> Tensor:
        try:
            with safe_open(file, "pt") as opened:
                there = opened.get_slice("features")
                shape = tuple(there.get_shape())
                features: Tensor = there[rows]
        except (SafetensorError, OSError, KeyError) as error:
            raise StoreError(
                f"{file} is damaged ({' '.join(str(error).split())}): delete it and run again to "
                "compute its rows anew"
            ) from error
        expected = (length or shape[0], self.shape[1])
        if shape != expected:
            raise StoreError(f"{file} must hold features {expected}, got {shape}")
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
            parts.append(self._read(shard, slice(max(start - first, 0), stop - first)))
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])

    def load(self) -> Tensor:
        """All features, ``[N, K]``."""
        return self[:]


def _shard_rows(num_features: int) -> int:
    """Rows of a shard: fewer where rows are so wide that a shard would not fit memory."""
    return max(1, min(_ROWS_PER_SHARD, _BYTES_PER_SHARD // (4 * max(num_features, 1))))
