"""Features ``[N, K]`` on disk: written shard by shard, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runs.choices import FLOAT32
from ..runs.files import LOCK_FILE, claim, expand_path, write_atomically
from ..runs.folders import Record
from ..runs.ranks import Ranks, ranks
from .packing import pack, unpack

# of a shard, whatever the batch size
_ROWS_PER_SHARD, _BYTES_PER_SHARD = 512, 2**28
# rows after which a shard that is being made is kept as far as it has come
ROWS_PER_PART = 64


class StoreError(ValueError):
    """A feature store that does not fit what is asked, or is damaged; the message says which."""


# key of what rows are kept as, in the settings of a manifest
STORE_DTYPE = "store dtype"
MANIFEST = Record("manifest.json", "features made with other settings", StoreError, format=3)
# key of the names of its rows, in the metadata of a shard
_IDS = "ids"


class Store(Protocol):
    """Features ``[N, K]``, filled shard by shard and read in contiguous slices."""

    shape: tuple[int, int]
    batch_size: int

    @property
    def ids(self) -> list[str]:
        """N sample ids, the rows."""
        ...

    def missing(self) -> list[int]:
        """Shards that are still to be computed."""
        ...

    def to_fill(self) -> Iterator[int]:
        """Missing shards that this process is to compute, one after the other."""
        ...

    def count(self) -> int:
        """Rows that are there, those of missing shards that are kept included."""
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
        dtype: what rows are rounded to, as one on disk keeps them.
    """

    def __init__(
        self, ids: Sequence[str], num_features: int, batch_size: int, dtype: str = FLOAT32
    ) -> None:
        self.ids, self.batch_size, self.dtype = list(ids), batch_size, dtype
        self.shape = (len(self.ids), num_features)
        self._step = _shard_rows(num_features)
        self._features = torch.empty(self.shape)
        self._done: set[int] = set()

    def missing(self) -> list[int]:
        """See `Store.missing`."""
        return [n for n in range(-(-len(self) // self._step)) if n not in self._done]

    def to_fill(self) -> Iterator[int]:
        """See `Store.to_fill`: all of them, which no other process has a part in."""
        return iter(self.missing())

    def count(self) -> int:
        """See `Store.count`."""
        return sum(len(range(*self.rows(shard).indices(len(self)))) for shard in self._done)

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
        features = unpack(pack(features.cpu(), self.dtype))
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

    Rows can be read in slices (``store[i:j]``), so nothing needs them in memory at once. A shard
    has the ids of its rows beside them, the manifest no more than their number and fingerprint.
    Processes that share a store divide its shards; see `runs.ranks`.

    Attributes:
        folder: where it lies.
        shape: ``(N, K)``.
        rows_per_shard: rows of every shard but the last.
        batch_size: samples per batch the features were computed with.
        dtype: what rows are kept as; they are read as float32.
        only_own: of several processes each computes its own shards, and leaves the others.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], ids: list[str] | None = None
    ) -> None:
        self.folder, self.manifest, self.only_own = folder, manifest, False
        self.dtype: str = manifest["settings"].get(STORE_DTYPE, FLOAT32)
        self._ids = ids
        self.shape: tuple[int, int] = (manifest["num_samples"], manifest["num_features"])
        self.rows_per_shard: int = manifest["rows_per_shard"]
        self.batch_size: int = manifest["batch_size"]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        deciding: dict[str, Any],
        ids: Sequence[str],
        num_features: int,
        batch_size: int | Callable[[], int],
        dtype: str = FLOAT32,
    ) -> FeatureStore:
        """Open the store in ``folder``, or begin one.

        Args:
            folder: of the store.
            deciding: everything that decides the numbers; JSON-serialisable.
            ids: N sample ids.
            num_features: ``K``.
            batch_size: samples per batch of a new store, or what finds it; an existing one keeps
                its own.
            dtype: what rows are kept as, a key of `choices.STORE_DTYPES`.

        Raises:
            StoreError: the folder holds a store made with other settings (the keys are named) or of
                other samples, or its manifest is unreadable.
        """
        folder, names = Path(folder), _fingerprint(ids)
        if dtype != FLOAT32:
            deciding = {**deciding, STORE_DTYPE: dtype}
        # two that begin it at once may choose different batches
        with ranks().alone(folder.parent, f"open-{folder.name}"):
            found = MANIFEST.check(folder, deciding)
            if found is None:
                size = batch_size() if callable(batch_size) else batch_size
                layout = {
                    "num_samples": len(ids),
                    "num_features": num_features,
                    "rows_per_shard": _shard_rows(num_features),
                    "batch_size": size,
                    _IDS: names,
                }
                found = MANIFEST.claim(folder, deciding, also=layout)
        if found.get(_IDS) != names:
            raise StoreError(
                f"{folder} must hold features of the {len(ids):,} given samples, got others"
            )
        return cls(folder, found, ids if isinstance(ids, list) else list(ids))

    @classmethod
    def read(cls, folder: str | Path) -> FeatureStore:
        """The store in ``folder``, whatever its settings.

        Raises:
            StoreError: there is none, or its manifest is damaged or of another format.
        """
        folder = expand_path(folder)
        found = MANIFEST.read(folder)
        if found is None:
            raise StoreError(f"{folder} must hold a store of features, got no {MANIFEST.file_name}")
        try:
            return cls(folder, found)
        except (KeyError, TypeError) as error:
            raise MANIFEST.damaged(folder) from error

    @property
    def ids(self) -> list[str]:
        """N sample ids, the rows; of a store that is read they are all read at the first call.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        if self._ids is None:
            self._ids = [
                name for shard in range(self.num_shards) for name in self.ids_of_shard(shard)
            ]
        return self._ids

    def ids_of(self, rows: Sequence[int]) -> list[str]:
        """Ids of some rows, in their order; raises as `ids`, of no shard but theirs."""
        if self._ids is not None:
            return [self._ids[row] for row in rows]
        size, found = self.rows_per_shard, dict[int, str]()
        for shard, chosen in itertools.groupby(sorted(set(rows)), lambda row: row // size):
            names = self.ids_of_shard(shard)
            found |= {row: names[row % size] for row in chosen}
        return [found[row] for row in rows]

    def ids_of_shard(self, shard: int) -> list[str]:
        """Ids of the rows of a shard; raises as `ids`."""
        file, rows = self._existing(shard), self.rows(shard)
        try:
            with safe_open(file, "pt") as opened:
                found: list[str] = json.loads(opened.metadata()[_IDS])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(file, error) from error
        if len(found) != rows.stop - rows.start:
            raise StoreError(f"{file} must name {rows.stop - rows.start} samples, got {len(found)}")
        return found

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.shape[0] // self.rows_per_shard)

    def file(self, shard: int) -> Path:
        """Where a shard lies, or will."""
        return self.folder / f"{shard:06d}.safetensors"

    def rows(self, shard: int) -> slice:
        """Rows of a shard."""
        first = shard * self.rows_per_shard
        return slice(first, min(first + self.rows_per_shard, self.shape[0]))

    def missing(self) -> list[int]:
        """Shards that are still to be computed."""
        return [shard for shard in range(self.num_shards) if not self.file(shard).is_file()]

    def to_fill(self) -> Iterator[int]:
        """See `Store.to_fill`; each is claimed while it is yielded."""
        here = ranks()
        if not here.is_shared:
            return iter(self.missing())
        return here.divide(
            range(self.num_shards),
            self._claim,
            lambda shard: self.file(shard).is_file(),
            only_own=self.only_own and not here.is_launched,
        )

    def _claim(self, shard: int, wait: bool) -> AbstractContextManager[bool]:
        return claim(self.folder / LOCK_FILE, part=range(shard, shard + 1), wait=wait)

    def count(self) -> int:
        """See `Store.count`."""
        return len(self) - sum(self._left(shard) for shard in self.missing())

    def _left(self, shard: int) -> int:
        """Rows of a shard that are not kept yet."""
        whole, first = self.rows(shard), 0
        while (file := self._part(shard, first)).is_file():
            try:
                with safe_open(file, "pt") as opened:
                    first += opened.get_slice("features").get_shape()[0]
            except FileNotFoundError:
                # another process has finished the shard
                return 0
            except (SafetensorError, OSError) as error:
                raise self._damaged(file, error) from error
        return whole.stop - whole.start - first

    def begun(self, shard: int) -> Tensor:
        """See `Store.begun`."""
        found, first = [torch.empty(0, self.shape[1])], 0
        while (file := self._part(shard, first)).is_file():
            found.append(self._load(file, slice(None)))
            first += len(found[-1])
        # double precision stays what it is
        return torch.cat(found[1:] or found)

    def keep(self, shard: int, first: int, features: Tensor) -> None:
        """See `Store.keep`; rows are rounded when their shard is whole."""
        self._write(self._part(shard, first), features, FLOAT32)

    def write(self, shard: int, features: Tensor) -> None:
        """Write one shard, ``[rows of the shard, K]``, atomically."""
        if self._ids is None:
            raise StoreError(f"{self.folder} must be opened with the ids of its rows to be written")
        names = self._ids[self.rows(shard)]
        self._write(self.file(shard), features, self.dtype, {_IDS: json.dumps(names)})
        for part in self.folder.glob(self._part(shard, "*").name):
            part.unlink()

    def _part(self, shard: int, first: int | str) -> Path:
        return self.folder / f"{shard:06d}-from-{first}.safetensors"

    def _write(
        self, file: Path, features: Tensor, dtype: str, about: dict[str, str] | None = None
    ) -> None:
        write_atomically(file, save(pack(features.cpu().contiguous(), dtype), metadata=about))

    def _existing(self, shard: int) -> Path:
        file = self.file(shard)
        if not file.is_file():
            raise StoreError(
                f"{self.folder} is incomplete: {file.name} is missing; run again to resume"
            )
        return file

    def _read(self, shard: int, rows: slice) -> Tensor:
        """Some rows of a shard, and no more than these."""
        whole = self.rows(shard)
        return self._load(self._existing(shard), rows, whole.stop - whole.start)

    def _load(self, file: Path, rows: slice, length: int | None = None) -> Tensor:
        try:
            with safe_open(file, "pt") as opened:
                shape = tuple(opened.get_slice("features").get_shape())
                names = ["features", *({"scales"} & set(opened.keys()))]
                features = unpack({name: opened.get_slice(name)[rows] for name in names})
        except (SafetensorError, OSError, KeyError) as error:
            raise self._damaged(file, error) from error
        expected = (length or shape[0], self.shape[1])
        if shape != expected:
            raise StoreError(f"{file} must hold features {expected}, got {shape}")
        return features

    def _damaged(self, file: Path, error: Exception) -> StoreError:
        return StoreError(
            f"{file} is damaged ({' '.join(str(error).split())}): delete it and run again to "
            "compute its rows anew"
        )

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


class Part:
    """Consecutive rows of a store, as a store of their own to read."""

    def __init__(self, store: Store, rows: range) -> None:
        self._store, self._rows = store, rows
        self.shape = (len(rows), store.shape[1])

    def __getitem__(self, rows: slice) -> Tensor:
        """Features of a contiguous slice of the rows, ``[rows, K]``."""
        chosen = self._rows[rows]
        return self._store[chosen.start : chosen.stop]


def own_rows(store: Store, here: Ranks) -> Store | Part:
    """Of the rows of a store those whose scores a process makes; all, where it is alone."""
    if not here.is_launched:
        return store
    first, last = (len(store) * rank // here.world for rank in (here.rank, here.rank + 1))
    return Part(store, range(first, last))


def _fingerprint(ids: Sequence[str]) -> str:
    """SHA-256 of names in their order."""
    digest, step = hashlib.sha256(), 2**16
    for first in range(0, len(ids), step):
        digest.update(json.dumps(list(ids[first : first + step])).encode())
    return digest.hexdigest()


def _shard_rows(num_features: int) -> int:
    """Rows of a shard: fewer where rows are so wide that a shard would not fit memory."""
    return max(1, min(_ROWS_PER_SHARD, _BYTES_PER_SHARD // (4 * max(num_features, 1))))
