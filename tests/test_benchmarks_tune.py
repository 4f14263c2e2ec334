"""The tuner: it keeps what is right and faster, and writes where the kernels look."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dtrak_kernels import gram_kernel, projection, tuning

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
    original = tuning.nearest
    monkeypatch.setattr(tuning, "nearest", lambda *arguments: original(*arguments, tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: Card.name)
    monkeypatch.setattr(torch.version, "hip", None)

    class OnACard:
        shape = (8, 64)
        device = torch.device("cuda")

        def __len__(self):
            return 8

    assert projection._config("rademacher", OnACard(), 64) == projection.Config(**config)
    assert projection._config("normal", OnACard(), 64) == projection.default_config(90)
    assert gram_kernel._config(OnACard(), 2)["BLOCK_N"] == 32


@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_a_rehearsal_writes_a_file(operation, tmp_path, monkeypatch, capsys):
    out = str(tmp_path)
    # one round of each
    monkeypatch.setattr(tune, "measure", lambda run: float(run().numel()))
    monkeypatch.setattr(sys, "argv", ["tune.py", "--smoke", "--operation", operation, "--out", out])
    assert tune.main() == 0
    ((device, entries),) = json.loads((tmp_path / f"{operation}.json").read_text()).items()
    assert device == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    made = entries[0]["config"]
    if operation == "gram_product":
        assert set(made) == set(gram_kernel.DEFAULT_CONFIG)
    else:
        projection.Config(**made)
    assert "ms by default" in capsys.readouterr().out


def test_refusals(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--smoke"])
    assert tune.main() == 2
    assert "--out must be given with --smoke" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    assert tune.main() == 2
    assert "tuning needs a GPU, there is none here" in capsys.readouterr().err
