"""This process among others that share its work: what is its own, what it waits for, who speaks.

A launcher (torchrun, accelerate launch) says by its variables which of how many processes this is,
or ``--shard 3/16`` does. Work is divided by claims in a folder that all of them see. A claim ends
with its process, however that ends: nothing is planned ahead, and who is left does what is left.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .files import LOCK_FILE, write_atomically
from .folders import LOCKS, OutputError, alone_at, alone_in, describe_differences
from .locks import hold_shared

T = TypeVar("T", bound=Hashable)
# of a launcher; accelerate takes any of them for a training that this process has a part of
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# seconds until every process that was launched must have begun
_START_SECONDS = 600
# of a wait for others, who may train a model meanwhile
_WAIT = timedelta(days=30)
_RECORD = "ranks.json"
# how many pieces of work this process is at for which the others wait
_alone = 0
# how often word was left under a name
_times: dict[tuple[str, int], int] = {}


class LeftToOthers(Exception):
    """What is left of the work is another process's: this one ends, and all is well."""


@dataclass(frozen=True)
class Ranks:
    """One process of several.

    Attributes:
        rank: which, from 0.
        world: of how many.
        local: which on its machine, from 0.
        is_launched: whether a launcher started them all, so that they can speak to each other.
        is_shared: whether others may be at the same work.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    is_launched: bool = False
    is_shared: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this one speaks: the first of those launched; one alone speaks for itself."""
        return self.rank == 0 or not self.is_launched

    def divide(
        self,
        pieces: Sequence[T],
        claim: Callable[[T, bool], AbstractContextManager[bool]],
        is_made: Callable[[T], bool],
        *,
        only_own: bool = False,
    ) -> Iterator[T]:
        """The pieces of work that this process is to do, each claimed while it is yielded.

        Its own come first, ``pieces[rank::world]``, then those that nobody is at. At the end it
        waits for who is at one, and takes over what that one left.

        Args:
            pieces: all of them, the same for every process.
            claim: of a piece, waiting or not, as `files.claim`.
            is_made: whether a piece is finished.
            only_own: leave the others to those whose they are.
        """
        own = pieces[self.rank :: self.world]
        others = [] if only_own else [piece for piece in pieces if piece not in set(own)]
        left = [piece for piece in (*own, *others) if not is_made(piece)]
        while left:
            busy = []
            for piece in left:
                if is_made(piece):
                    continue
                with claim(piece, False) as is_ours:
                    if not is_ours:
                        busy.append(piece)
                    # another may have made it in between
                    elif not is_made(piece):
                        yield piece
            if len(busy) == len(left):
                with claim(busy[0], True):
                    pass
            left = busy

    @property
    def speaks(self) -> bool:
        """Whether this one shows what it does: the main one, or who works while the others wait."""
        return self.is_main or _alone > 0

    @contextmanager
    def alone(self, folder: Path, name: str) -> Iterator[None]:
        """One process at a time, of those that share a folder; nothing where this one is alone."""
        global _alone
        if not self.is_shared:
            yield
            return
        with alone_at(folder, name, wait=True):
            _alone += 1
            try:
                yield
            finally:
                _alone -= 1

    @contextmanager
    def hold(self, folder: Path, about: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Keep other commands from writing into a folder, but for those that share this work.

        Args:
            folder: made if missing.
            about: called for what must be the same for all of them, JSON-serialisable.

        Raises:
            OutputError: a command that shares nothing is at work there, or one that shares other
                work (what differs), or launched processes see different folders.
        """
        if not self.is_shared:
            with alone_in(folder):
                yield
            return
        record = folder / LOCKS / _RECORD
        folder.mkdir(parents=True, exist_ok=True)
        # over NFS a lock that is shared is one of what is read
        with (folder / LOCK_FILE).open("a+") as opened:
            with alone_at(folder, "ranks", wait=True):
                wanted = json.loads(json.dumps(about()))
                if hold_shared(opened, first=True):
                    # nobody is at work: what was written here before binds nobody
                    found = {"folder": uuid.uuid4().hex, "settings": wanted}
                    write_atomically(record, json.dumps(found, indent=1).encode())
                if not hold_shared(opened, first=False):
                    raise OutputError(
                        f"another command is at work in {folder}: wait until it has ended, or "
                        "choose another --output"
                    )
                found = json.loads(record.read_text())
            differing = describe_differences(found["settings"], wanted)
            if differing:
                raise OutputError(
                    f"the commands that share {folder} must be the same, got another: {differing}"
                )
            self.agree("folder", {"--output": f"{folder} ({found['folder'][:8]})"})
            yield

    def agree(self, name: str, about: dict[str, Any]) -> None:
        """Refuse processes of one launch that were not called alike.

        Args:
            name: of what is compared.
            about: JSON-serialisable.

        Raises:
            ValueError: what differs, and in which process.
        """
        if not self.is_launched:
            return
        store, key = _store(), self._key(name)
        store.set(f"{key}/{self.rank}", json.dumps(about))
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        try:
            store.wait(keys, timedelta(seconds=_START_SECONDS))
        except RuntimeError as error:
            raise ValueError(
                f"{self.world} processes must start within {_START_SECONDS} s of each other, but "
                "some have not"
            ) from error
        found = [json.loads(store.get(key)) for key in keys]
        for rank, other in enumerate(found):
            differing = describe_differences(found[0], other)
            if differing:
                text = differing.replace(" there and ", " in rank 0 and ").replace(" here", "")
                raise ValueError(
                    f"all processes of a launch must be called alike, rank {rank} is not: {text}"
                )

    def meet(self, name: str) -> None:
        """Wait until all processes of a launch have come this far.

        Args:
            name: of the place.
        """
        if self.is_launched:
            store, key = _store(), self._key(f"met/{name}")
            store.set(f"{key}/{self.rank}", "")
            store.wait([f"{key}/{rank}" for rank in range(self.world)], _WAIT)

    def told(self, name: str, value: Any) -> Any:
        """What the main process of a launch says of something, JSON-serialisable.

        Args:
            name: of it.
            value: what the main process says; whatever the others think is left.
        """
        if not self.is_launched:
            return value
        store, key = _store(), self._key(f"told/{name}")
        if self.is_main:
            store.set(key, json.dumps(value))
            return value
        store.wait([key], _WAIT)
        return json.loads(store.get(key))

    def _key(self, name: str) -> str:
        """What is left word under: another one each time, as all processes make the same calls."""
        times = _times[name, self.rank] = _times.get((name, self.rank), 0) + 1
        return f"dtrak/{name}/{times}"

    def is_first_to_fail(self) -> bool:
        """Whether none of those launched with this one has failed yet, so that one line is said."""
        if not self.is_launched:
            return True
        try:
            return int(_store().add("dtrak/failed", 1)) == 1
        # where nobody can be asked, saying it twice is better than never
        except Exception:
            return True

    def group(self) -> Any:
        """The process group of those that were launched; None where this one is alone.

        It is of gloo, whatever group a script may have made for itself.
        """
        if not self.is_launched:
            return None
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_backend() != "gloo":
            return _beside()
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("dtrak/group", _store()),
                rank=self.rank,
                world_size=self.world,
                timeout=_WAIT,
            )
        return dist.group.WORLD


@cache
def _beside() -> Any:
    """A group of gloo beside another one of the same processes."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_WAIT)


@cache
def _store() -> Any:
    """What launched processes leave word for each other in."""
    import torch.distributed as dist

    here = ranks()
    where = f"env://?rank={here.rank}&world_size={here.world}"
    timeout = timedelta(seconds=_START_SECONDS)
    return next(iter(dist.rendezvous(where, timeout=timeout)))[0]


_shard: tuple[int, int] | None = None


def share(shard: str | None) -> None:
    """Take part in work that other commands are at, too, as ``--shard`` says.

    Raises:
        ValueError: it is no ``i/n`` with i from 1 to n, or a launcher has said it already.
    """
    global _shard
    _shard = None if shard is None else parse_shard(shard)
    if _shard is not None and _launched() is not None:
        raise ValueError(
            f"--shard is for commands started one by one, got {shard} under a launcher"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """``(i, n)`` of ``i/n``.

    Raises:
        ValueError: it is something else, or i is not from 1 to n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"--shard must be i/n with i from 1 to n, such as 3/16, got {text!r}")
    return i, n


def ranks() -> Ranks:
    """This process."""
    launched = _launched()
    if launched is not None:
        return launched
    if _shard is None:
        return Ranks()
    i, n = _shard
    return Ranks(i - 1, n, i - 1, is_shared=True)


def _launched() -> Ranks | None:
    """What a launcher says; None for none, or one that has started this process alone."""
    found = [os.environ.get(name, "") for name in LAUNCHER[:3]]
    rank, world, local = (int(text) if text.isdecimal() else None for text in found)
    if rank is None or world is None or world < 2:
        return None
    return Ranks(rank, world, rank if local is None else local, is_launched=True, is_shared=True)


@contextmanager
def by_itself() -> Iterator[None]:
    """Hide the launcher from libraries that would take this process for a part of one training."""
    kept = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
