"""Processes that share their work: what is whose, what they wait for, what is refused by name."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from claims import claimed_elsewhere
from test_features import Counting, make_data, make_store
from typer.testing import CliRunner

import dtrak
from dtrak.cli import ensemble
from dtrak.features import store as stores
from dtrak.features.extraction import fill_store
from dtrak.runs import ranks as module
from dtrak.runs.files import LOCK_FILE, claim
from dtrak.runs.folders import OutputError, alone_in
from dtrak.runs.ranks import LAUNCHER, Ranks, by_itself, parse_shard, ranks, share

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    share(None)


def launched(monkeypatch, rank, world, local=None):
    values = zip(LAUNCHER, (rank, world, rank if local is None else local, world), strict=True)
    for name, value in values:
        monkeypatch.setenv(name, str(value))


def test_who_a_process_is(monkeypatch):
    assert ranks() == Ranks()
    share("3/16")
    assert ranks() == Ranks(2, 16, 2, is_shared=True)
    # one by one, each speaks for itself
    assert ranks().is_main
    launched(monkeypatch, 5, 8, local=1)
    assert ranks() == Ranks(5, 8, 1, is_launched=True, is_shared=True)
    assert not ranks().is_main
    with by_itself():
        assert not any(name in os.environ for name in LAUNCHER)
    assert ranks().rank == 5
    with pytest.raises(ValueError, match="--shard is for commands started one by one, got 1/2"):
        share("1/2")
    share(None)
    # a launcher of one process
    launched(monkeypatch, 0, 1)
    assert ranks() == Ranks()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", ""])
def test_shards_that_are_none(text):
    with pytest.raises(ValueError, match="--shard must be i/n with i from 1 to n, such as 3/16"):
        parse_shard(text)


def test_own_pieces_come_first_and_what_others_are_at_last(tmp_path):
    made = set()
    lock = lambda piece, wait: claim(tmp_path / LOCK_FILE, part=range(piece, piece + 1), wait=wait)

    def work(here, **how):
        for piece in here.divide(range(7), lock, made.__contains__, **how):
            made.add(piece)
            yield piece

    assert list(work(Ranks(1, 3, is_shared=True), only_own=True)) == [1, 4]
    with ExitStack() as stack:
        stack.enter_context(claimed_elsewhere(tmp_path, range(2, 3)))
        worker = work(Ranks(2, 3, is_shared=True))
        assert [next(worker) for _ in range(4)] == [5, 0, 3, 6]
        # the other one goes without having made its piece
        stack.close()
        assert list(worker) == [2]
    assert list(work(Ranks(0, 3, is_shared=True))) == []


def test_a_folder_is_held_together_by_those_that_share_it(tmp_path):
    here = Ranks(0, 2, is_shared=True)
    about = lambda **changes: lambda: {"options": {"seed": 0} | changes}
    with here.hold(tmp_path, about()):
        with Ranks(1, 2, is_shared=True).hold(tmp_path, about()):
            pass
        with pytest.raises(
            OutputError, match=r"must be the same, got another: options.seed is 0 t"
        ):
            here.hold(tmp_path, about(seed=1)).__enter__()
        with pytest.raises(OutputError, match="another command is at work"):
            alone_in(tmp_path).__enter__()
    # nobody is there any more: what they shared binds nobody
    with here.hold(tmp_path, about(seed=1)):
        pass
    with alone_in(tmp_path), pytest.raises(OutputError, match="another command is at work"):
        here.hold(tmp_path, about(seed=1)).__enter__()


class Word:
    """What launched processes leave word in, in this process."""

    def __init__(self):
        self.left = {}

    def set(self, key, value):
        self.left[key] = value

    def get(self, key):
        return self.left[key]

    def wait(self, keys, timeout):
        if not all(key in self.left for key in keys):
            raise RuntimeError("timeout")

    def add(self, key, amount):
        self.left[key] = self.left.get(key, 0) + amount
        return self.left[key]


def test_launched_processes_must_be_called_alike(monkeypatch):
    word = Word()
    monkeypatch.setattr(module, "_store", lambda: word)
    here = [Ranks(rank, 2, rank, is_launched=True, is_shared=True) for rank in range(2)]
    with pytest.raises(ValueError, match="2 processes must start within 600 s of each other"):
        here[0].agree("options", {"seed": 0, "k": 3})
    with pytest.raises(ValueError, match=r"rank 1 is not: seed is 0 in rank 0 and 4$"):
        here[1].agree("options", {"seed": 4, "k": 3})
    # said again, it is another question
    with pytest.raises(ValueError, match="but some have not"):
        here[0].agree("options", {"seed": 4, "k": 3})
    here[1].agree("options", {"seed": 4, "k": 3})
    for answer in (True, False):
        assert here[0].told("finished", answer) is answer
        assert here[1].told("finished", None) is answer
    assert [one.is_first_to_fail() for one in (*here, *here)] == [True, False, False, False]
    assert Ranks().is_first_to_fail()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shards_are_made_apart_with_the_bits_of_one(tmp_path, monkeypatch, world):
    monkeypatch.setattr(stores, "_ROWS_PER_SHARD", 16)
    data = make_data(90)
    alone = make_store(tmp_path / "alone", data)
    fill_store(alone, Counting(), data)
    for rank in range(world):
        share(f"{rank + 1}/{world}")
        store = make_store(tmp_path / "shared", data)
        store.only_own = True
        seen = []
        fill_store(store, Counting(), data, progress=lambda *done, seen=seen: seen.append(done))
        assert store.missing() == [n for n in range(6) if n % world > rank]
        assert seen[-1] == (store.count(), 90)
    assert torch.equal(store.load(), alone.load())
    share(None)


def test_launched_processes_explain_by_a_folder_that_all_see(monkeypatch):
    launched(monkeypatch, 1, 3)
    with pytest.raises(ValueError, match=r"must be a folder that all 3 processes .* got None"):
        dtrak.explain(None, None, 3)


def test_of_a_command_that_shares_nothing_the_first_process_does_all(monkeypatch, tmp_path):
    launched(monkeypatch, 1, 2)
    words = ["nowhere", "nowhere else", "--output", str(tmp_path / "mean.safetensors")]
    done = CliRunner().invoke(ensemble.app, words)
    assert (done.exit_code, done.output) == (0, "")


@pytest.mark.full
def test_processes_that_are_killed_lose_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "ranks_killed.py", tmp_path, "20"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "20 killed" in done.stdout
