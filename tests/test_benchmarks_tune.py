"""The tuner: it keeps what is right and faster, and writes where the kernels look."""

import importlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtrak_kernels import tuning
from dtrak_kernels.dense import config as dense_config
from dtrak_kernels.ridge import gram_triton as gram_kernel
from dtrak_kernels.sjlt import config as sketch_config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
tune = importlib.import_module("tune")


def problem(run, **choices):
    return tune.Problem("project_normal", {"B": 8}, {"a": 1, "b": 1}, choices, run)


def search(one, seconds_of, *, deadline=1e9, clock=lambda: 0.0):
    """Search with times that are a function of the configuration."""
    ran = []

    def run(config):
        ran.append(config)
        return one.run(config)

    watched = tune.Problem(one.operation, one.sizes, one.default, one.choices, run)

    def timer(call):
        call()
        return seconds_of(ran[-1])

    return tune.search(watched, deadline, timer=timer, clock=clock), ran


def test_it_walks_to_the_fastest():
    one = problem(lambda config: torch.ones(3), a=(1, 2, 4), b=(1, 2, 4))
    (best, fastest, first), _ = search(one, lambda c: 10 / c["a"] + abs(c["b"] - 2) + 0.1)
    assert best == {"a": 4, "b": 2}
    assert (fastest, first) == (pytest.approx(2.6), pytest.approx(11.1))


def test_wrong_and_impossible_configurations_are_no_candidates():
    def run(config):
        if config["a"] == 2:
            raise RuntimeError("out of shared memory")
        if config["b"] == 2:
            return torch.full((3,), torch.nan)
        return torch.ones(3) + 1e-3 * (config["a"] == 4)

    (best, _, _), ran = search(
        problem(run, a=(2, 4, 8), b=(2, 3)), lambda c: 1 / c["a"] / (1, 9, 2)[c["b"] - 1]
    )
    assert best == {"a": 8, "b": 3}
    assert {"a": 2, "b": 1} in ran


def test_a_hair_is_not_faster():
    one = problem(lambda config: torch.ones(3), a=(1, 2))
    (best, _, _), _ = search(one, lambda c: 1.0 if c["a"] == 1 else 0.98)
    assert best == one.default


def test_it_stops_in_time_with_what_it_has():
    ticks = iter(range(100))
    one = problem(lambda config: torch.ones(3), a=(2, 4, 8, 16))
    (best, _, _), _ = search(one, lambda c: 1 / c["a"], deadline=2, clock=lambda: next(ticks))
    assert best == {"a": 4, "b": 1}


def test_entries_replace_their_own_kind_only(tmp_path):
    one = problem(None)
    other = tune.Problem("project_normal", {"B": 32}, {}, {}, None)
    for what, device, value in ((one, "A", 1), (one, "B", 2), (other, "A", 3), (one, "A", 4)):
        file = tune.store(tmp_path, what, device, {"a": value})
    assert json.loads(file.read_text()) == {
        "A": [
            {"sizes": {"B": 8}, "config": {"a": 4}},
            {"sizes": {"B": 32}, "config": {"a": 3}},
        ],
        "B": [{"sizes": {"B": 8}, "config": {"a": 2}}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["project_normal.json"]
    tuning._entries.cache_clear()
    assert tuning.nearest("project_normal", "A", {"B": 20}, tmp_path) == {"a": 3}


class Card:
    """What the kernels ask a device."""

    name, major, minor, multi_processor_count = "Some card", 9, 0, 132


def test_kernels_launch_what_was_written(tmp_path, monkeypatch):
    """From the tuner's file to the configuration of a launch."""
    config = {"block_b": 32, "block_k": 64, "num_warps": 4, "num_stages": 2, "splits": 3}
    dense = tune.Problem("project_rademacher", {"B": 8, "P": 100, "K": 64}, {}, {}, None)
    tune.store(tmp_path, dense, "Some card", config)
    gram = tune.Problem("gram_product", {"N": 8, "K": 64, "M": 2}, {}, {}, None)
    tune.store(tmp_path, gram, "Some card", gram_kernel.DEFAULT_CONFIG | {"BLOCK_N": 32})
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    tuning._entries.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: Card.name)
    monkeypatch.setattr(torch.version, "hip", None)

    class OnACard:
        shape = (8, 64)
        device = torch.device("cuda")

        def __len__(self):
            return 8

    assert dense_config.config_on("rademacher", OnACard(), 64) == dense_config.DenseConfig(**config)
    default = dense_config.default_config(90, "normal")
    assert dense_config.config_on("normal", OnACard(), 64) == default
    assert gram_kernel._config(OnACard(), 2)["BLOCK_N"] == 32
    # what nobody can launch is an error that names the file
    tune.store(tmp_path, dense, "Some card", {"block_b": 33})
    tuning._entries.cache_clear()
    with pytest.raises(ValueError, match=r"configs/project_rademacher\.json, Some card: block_b"):
        dense_config.config_on("rademacher", OnACard(), 64)
    tuning._entries.cache_clear()


@pytest.mark.parametrize(
    "read, config, message",
    [
        (dense_config.read_config, {}, "block_b must be given, got nothing"),
        (
            dense_config.read_config,
            {"block_b": 32, "blok_k": 64},
            "fields must be among block_b, block_k, num_warps, num_stages, splits, got 'blok_k'",
        ),
        (
            dense_config.read_config,
            {"block_b": 48},
            "block_b must be a power of two from 16 to 256, got 48",
        ),
        (
            dense_config.read_config,
            {"block_b": 32, "splits": -1},
            "splits must be a whole number from 0 to 32768, got -1",
        ),
        (
            dense_config.read_config,
            {"block_b": 32, "num_stages": True},
            "num_stages must be a whole number from 1 to 16, got True",
        ),
        (gram_kernel.read_config, {"BLOCK_N": 16}, "BLOCK_K must be given, got BLOCK_N"),
        (
            gram_kernel.read_config,
            gram_kernel.DEFAULT_CONFIG | {"BLOCK_M": "32"},
            "BLOCK_M must be a power of two from 16 to 256, got '32'",
        ),
    ],
)
def test_impossible_configurations_are_refused(read, config, message):
    with pytest.raises(ValueError, match=rf"^here: {message}$"):
        read(config, "here")
    good = gram_kernel.DEFAULT_CONFIG if read is gram_kernel.read_config else {"block_b": 32}
    assert read(good, "here") is not None


def test_what_the_tuner_tries_can_be_read():
    for operation in ("project_normal", "gram_product"):
        one = next(tune.make_problems(operation, torch.device("cpu"), smoke=True))
        module = gram_kernel if operation == "gram_product" else dense_config
        for name, values in one.choices.items():
            for value in values:
                module.read_config(one.default | {name: value}, operation)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    return tune.main()


# one way for all: two that differ most
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(o, marks=() if o in ("sketch", "project_rademacher") else pytest.mark.full)
        for o in tune.OPERATIONS
    ],
)
def test_a_rehearsal_writes_a_file(operation, tmp_path, monkeypatch, capsys):
    # one round of each
    monkeypatch.setattr(tune, "measure", lambda run, rounds: float(run().numel()))
    where = ("--out", str(tmp_path), "--journal", str(tmp_path / "tune.jsonl"))
    assert run_main(monkeypatch, "--worker", "--smoke", "--operation", operation, *where) == 0
    ((device, entries),) = json.loads((tmp_path / f"{operation}.json").read_text()).items()
    assert device == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    made = entries[0]["config"]
    if operation == "gram_product":
        assert set(made) == set(gram_kernel.DEFAULT_CONFIG)
    elif operation == "sketch":
        assert len(entries) == len(tune.sketch_layers.TINY)
        for entry in entries:
            sketch_config.read_config(entry["config"], "sketch")
            sketch_config.read_form(entry["sizes"]["form"])
    else:
        dense_config.DenseConfig(**made)
    assert "ms by default" in capsys.readouterr().out


def test_refused_candidates_are_not_run_and_the_journal_says_why(tmp_path):
    ran = []

    def run(config):
        ran.append(config["a"])
        if config["a"] == 3:
            raise RuntimeError("out of\nregisters")
        return torch.full((2,), 1.0 + (config["a"] == 5))

    one = tune.Problem(
        "sketch",
        {"T": 3},
        {"a": 1},
        {"a": (2, 3, 4, 5)},
        run,
        lambda config: "it is even" if config["a"] % 2 == 0 else "",
    )
    journal = tune.Journal(tmp_path / "tune.jsonl", "Some card")
    tune.search(one, 1e9, timer=lambda call: 1.0, clock=lambda: 0.0, journal=journal)
    assert set(ran) == {1, 3, 5}
    # a line before a candidate is tried and one after; only one if it is not tried
    rows = tune.read_rows(tmp_path / "tune.jsonl")
    assert [(r["config"]["a"], r.get("seconds"), r.get("reason")) for r in rows] == [
        (1, None, None),
        (1, 1.0, None),
        (2, None, "it is even"),
        (3, None, None),
        (3, None, "RuntimeError: out of registers"),
        (4, None, "it is even"),
        (5, None, None),
        (5, None, "its result differs by 1.0e+00"),
    ]


def test_a_search_goes_on_after_what_ended_it(tmp_path):
    """Lines of another process: times are taken over, an unfinished candidate is not tried."""
    file = tmp_path / "tune.jsonl"

    def run(config):
        assert config["a"] not in (1, 2), "tried again"
        return torch.ones(2)

    one = tune.Problem("sketch", {"T": 3}, {"a": 1}, {"a": (2, 3)}, run)
    before = tune.Journal(file, "Some card")
    before.write(one, {"a": 1}, seconds=4.0)
    before.write(one, {"a": 2})
    # a card of another name says nothing, nor does half a line
    tune.Journal(file, "Another card").write(one, {"a": 3}, reason="broken")
    with file.open("a") as lines:
        lines.write('{"operation": "sk')
    journal = tune.Journal(file, "Some card")
    assert "ended the process" in journal.find(one, {"a": 2})["reason"]
    # what is compared with is run once more
    one = replace(one, run=lambda config: torch.ones(2) if config["a"] == 1 else run(config))
    found = tune.search(one, 1e9, timer=lambda call: 1.0, clock=lambda: 0.0, journal=journal)
    assert found == ({"a": 3}, 1.0, 4.0)


def test_every_improvement_is_kept_at_once():
    kept = []
    one = problem(lambda config: torch.ones(3), a=(2, 4))
    seconds = iter((4.0, 2.0, 3.0))
    tune.search(one, 1e9, timer=lambda call: next(seconds), clock=lambda: 0.0, keep=kept.append)
    assert kept == [{"a": 1, "b": 1}, {"a": 2, "b": 1}]


def test_a_default_that_does_not_run_is_an_error():
    one = problem(lambda config: 1 / 0, a=(2,))
    with pytest.raises(RuntimeError, match="the default configuration does not run: ZeroDivision"):
        tune.search(one, 1e9)


# candidates: fine and faster; a crash; a hang; a lost device; fine and faster still
BAD_SEARCH = """
import os, signal, sys, time
sys.path[:0] = [{benchmarks!r}]
import torch, tune

SECONDS = {{1: 5.0, 2: 4.0, 3: 3.0, 9: 1.0}}
last = []

def run(config):
    last.append(config["a"])
    if config["a"] == 4:
        os.kill(os.getpid(), signal.SIGSEGV)
    if config["a"] == 5:
        time.sleep(600)
    if config["a"] == 6:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return torch.ones(2)

def make(operation, device, *, smoke):
    choices = {{"a": (2, 4, 3, 5, 6, 9)}}
    yield tune.Problem(operation, {{"T": 7}}, {{"a": 1}}, choices, run)

tune.make_problems = make
tune.measure = lambda call, rounds=0: (call(), SECONDS[last[-1]])[1]
sys.exit(tune.main())
"""


# slow: four processes and a hang; the fast lane reads the journals they leave, and ends a search
@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="ends processes by signals")
def test_no_candidate_ends_the_search(tmp_path, monkeypatch, capfd):
    """A crash, a hang and a lost device cost a candidate each; the file is whole throughout."""
    script = tmp_path / "worker.py"
    script.write_text(BAD_SEARCH.format(benchmarks=str(Path(tune.__file__).parent)))
    monkeypatch.setattr(tune, "WORKER", [sys.executable, str(script), "--worker"])
    monkeypatch.setattr(tune, "PATIENCE", 30.0)
    ends, wait = [], tune.watch

    def watch(process, journal):
        status = wait(process, journal)
        ends.append((status, json.loads((tmp_path / "sketch.json").read_text())))
        return status

    monkeypatch.setattr(tune, "watch", watch)
    where = ("--out", str(tmp_path), "--journal", str(tmp_path / "tune.jsonl"))
    assert run_main(monkeypatch, "--smoke", "--operation", "sketch", *where) == 0
    assert [status for status, _ in ends] == [-signal.SIGSEGV, None, tune.LOST, 0]
    best = [entries["cpu"][0]["config"]["a"] for _, entries in ends]
    assert best == [2, 3, 3, 9]
    out = capfd.readouterr().out
    assert "the search hung; it goes on after that configuration" in out
    assert "the device was lost: RuntimeError: CUDA error" in out


def test_a_search_that_never_starts_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "WORKER", [sys.executable, "-c", "raise SystemExit(7)"])
    where = ("--out", str(tmp_path), "--journal", str(tmp_path / "tune.jsonl"))
    assert run_main(monkeypatch, "--smoke", *where) == 1
    assert "the search ended with status 7 before it tried anything" in capsys.readouterr().out


@pytest.mark.parametrize("text", [b'{"cpu": [', b"\xff\xfe", b'{"cpu": [{"config": 3}]}'])
def test_a_damaged_file_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "gram_product.json").write_bytes(text)
    monkeypatch.setattr(tune, "drive", lambda *_: pytest.fail("it was begun"))
    assert run_main(monkeypatch, "--smoke", "--out", str(tmp_path)) == 2
    assert "gram_product.json must " in capsys.readouterr().err
    assert (tmp_path / "gram_product.json").read_bytes() == text
    tuning._entries.cache_clear()
    with pytest.raises(ValueError, match=r"gram_product\.json must"):
        tuning.nearest("gram_product", "cpu", {"N": 3}, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_whoever_ends_the_tuner_ends_the_search(tmp_path):
    """SIGTERM, which a time limit sends, reaches only the process that watches the search."""
    script = tmp_path / "watching.py"
    pid = tmp_path / "pid"
    search = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(tune.__file__).parent)!r}); import tune\n"
        f"tune.WORKER = [sys.executable, '-c', {search!r}]\n"
        f"sys.argv = ['tune.py', '--smoke', '--out', {str(tmp_path)!r}, '--journal', "
        f"{str(tmp_path / 'tune.jsonl')!r}]\n"
        "sys.exit(tune.main())"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in out
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_refusals(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--smoke"])
    assert tune.main() == 2
    assert "--out must be given with --smoke" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert tune.main() == 2
    assert "tuning needs a GPU, there is none here" in capsys.readouterr().err
