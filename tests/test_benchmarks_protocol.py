"""The protocol of the benchmarks: nothing that disagrees is timed, rounds take turns."""

import dataclasses
import gc
import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
protocol = importlib.import_module("protocol")
races = importlib.import_module("races")

CPU = torch.device("cpu")
WORK = protocol.Work(flops=10.0, bytes=400.0)


@pytest.fixture(autouse=True)
def nothing_thaws(monkeypatch):
    """What the other tests imported stays out of sight, or every race looks through all of it."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    gc.freeze()


def provider(name, run, *, error=0.0, allowed=1e-6, prepare=None):
    check = protocol.Check("the truth", lambda result: error, allowed)
    return protocol.Provider(name, prepare or (lambda: run), (check,), WORK)


def outcome(*seconds, peak=0):
    return protocol.Outcome(seconds=list(seconds), errors=[0.0], peak_bytes=peak)


@pytest.mark.parametrize("error", [2e-6, math.nan, math.inf])
def test_who_disagrees_is_not_timed(error):
    calls = []
    found = protocol.race(
        [provider("good", lambda: None), provider("bad", lambda: calls.append(1), error=error)],
        CPU,
        seconds=0,
    )
    assert found["good"].counts
    assert not found["bad"].counts
    assert "disagrees with the truth" in found["bad"].failure
    # the runs whose result was compared, and no other
    assert len(calls) == 2


def test_agreement_is_checked_on_the_result_that_was_timed():
    results = iter(range(100))
    seen = []
    check = protocol.Check("counting", lambda result: seen.append(result) or 0.0, 1.0)
    one = protocol.Provider("one", lambda: lambda: next(results), (check,), WORK)
    protocol.race([one], CPU, seconds=0)
    # the last run before the timed ones
    assert seen == [1]


def test_rounds_take_turns():
    calls = []
    names = ["a", "b", "c"]
    found = protocol.race(
        [provider(name, lambda name=name: calls.append(name)) for name in names],
        CPU,
        seconds=0,
        rounds=(12, 20),
    )
    timed = calls[6:]
    assert [sorted(timed[at : at + 3]) for at in range(0, len(timed), 3)] == [names] * 12
    assert [len(found[name].seconds) for name in names] == [12, 12, 12]
    # whatever a neighbour leaves behind, everyone meets it
    others = {(a, b) for a in names for b in names if a != b}
    assert others <= set(itertools.pairwise(timed))


def test_a_slow_provider_gets_the_least_rounds_and_a_fast_one_more():
    burn = torch.randn(300, 300)
    found = protocol.race(
        [
            provider("fast", lambda: None),
            provider("slow", lambda: [burn @ burn for _ in range(20)]),
        ],
        CPU,
        seconds=1e-4,
        rounds=(3, 40),
    )
    assert len(found["slow"].seconds) == 3
    assert len(found["fast"].seconds) > 3


def test_who_cannot_run_or_breaks_does_not_stop_the_others():
    def absent():
        raise protocol.Absent("needs a moon")

    def broken():
        raise RuntimeError("no\nmemory")

    found = protocol.race(
        [
            provider("absent", None, prepare=absent),
            provider("broken", broken),
            provider("good", lambda: None),
        ],
        CPU,
        seconds=0,
    )
    assert found["absent"].absent == "needs a moon"
    assert found["broken"].failure == "RuntimeError: no memory"
    assert found["good"].counts


def test_peak_counts_kept_state_and_what_lives_at_once():
    def prepare():
        kept = torch.ones(1000)

        def run():
            first = torch.ones(500)
            second = torch.ones(250) + 0
            return first[0] + second[0] + kept[0]

        return run

    found = protocol.race([provider("one", None, prepare=prepare)], CPU, seconds=0)
    # 1000 kept; 500 and two of 250 at once, and scalars
    assert 4 * 2000 <= found["one"].peak_bytes <= 4 * 2020


def test_memory_made_lazily_counts_as_kept():
    kept = {}

    def run():
        if "x" not in kept:
            kept["x"] = torch.ones(3000)
        return kept["x"][0]

    found = protocol.race([provider("one", run)], CPU, seconds=0)
    assert 4 * 3000 <= found["one"].peak_bytes <= 4 * 3000 + 100


def test_views_count_once():
    gc.freeze()
    try:
        whole = torch.ones(4096)
        parts = whole.split(64)
        assert protocol.live_bytes() == whole.nbytes
        del parts
    finally:
        gc.unfreeze()


def test_figures():
    roofs = protocol.Roofs(copy=100.0, gemm=10.0, dtype="float32")
    found = protocol.figures(
        provider("one", None),
        outcome(8.0, 10.0, 9.0, 50.0, 7.0, peak=17),
        ("base", outcome(2.0, 3.0, 4.0)),
        roofs,
    )
    assert found["p50_seconds"] == 9.0
    assert found["p20_seconds"] == pytest.approx(7.8)
    assert found["p80_seconds"] == pytest.approx(18.0)
    assert found["ratio"] == pytest.approx(9.0 / 3.0)
    assert found["baseline"] == "base"
    assert found["peak_bytes"] == 17
    # 400 bytes at 100 a second take longer than 10 operations at 10 a second
    assert found["roof_fraction"] == pytest.approx(4.0 / 9.0)
    assert found["agreement"] == [{"with": "the truth", "error": 0.0, "allowed": 1e-6}]


def test_no_ratio_without_a_baseline():
    roofs = protocol.Roofs(copy=100.0, gemm=10.0, dtype="float32")
    found = protocol.figures(provider("one", None), outcome(1.0), None, roofs)
    assert found["ratio"] is None
    assert found["baseline"] is None


def test_roofs_are_rates_of_this_machine():
    roofs = protocol.measure_roofs(CPU, "float32", smoke=True)
    assert 1e6 < roofs.copy < 1e14
    assert 1e5 < roofs.gemm < 1e16
    assert not torch.backends.cuda.matmul.allow_tf32
    other = protocol.Roofs(copy=2 * roofs.copy, gemm=roofs.gemm / 2, dtype="float32")
    assert roofs.best(other) == protocol.Roofs(other.copy, roofs.gemm, "float32")


def test_gram_error_is_one_for_independent_entries_and_large_for_a_wrong_scale():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(24, 3000, generator=generator)
    matrix = torch.randn(3000, 400, generator=generator) / 20
    assert 0.8 < protocol.gram_error(grads @ matrix, grads) < 1.2
    assert protocol.gram_error(1.3 * grads @ matrix, grads) > 1.6
    assert protocol.gram_error(torch.randn(24, 400), grads) > 1.6


def test_gram_in_pieces(monkeypatch):
    x = torch.randn(3, 2**20 + 7)
    oracle = x.double() @ x.double().T
    assert protocol.relative_error(protocol.gram(x), oracle) < 1e-12


def test_relative_error_refuses_another_shape():
    with pytest.raises(ValueError, match="result must have shape"):
        protocol.relative_error(torch.ones(3), torch.ones(1, 3))


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.seconds = {}, []

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            start = self._timer()
            function()
            self.seconds.append(self._timer() - start)


def contest(*providers):
    baselines = tuple(provider.name for provider in providers)
    return races.Contest("suite", "group", {"B": 2}, baselines, list(providers))


def roofs(dtype):
    return protocol.Roofs(copy=1e9, gemm=1e9, dtype=dtype)


def test_a_race_is_run_once_and_shown_provider_by_provider():
    built, rows = [], []
    referee = races.Races(CPU, 0.0, False, lambda suite, **row: rows.append((suite, row)))

    def build():
        built.append(1)
        return contest(provider("a", lambda: None), provider("b", lambda: None))

    shown = []
    for name in ("a", "b"):
        benchmark = Benchmark()
        shown.append(referee.present(benchmark, "case", name, build, roofs))
        assert benchmark.group == "suite: group"
        assert benchmark.extra_info["provider"] == name
        assert len(benchmark.seconds) == 3
        assert sum(benchmark.seconds) == pytest.approx(sum(referee._outcomes[name].seconds))
    assert len(built) == 1
    assert [suite for suite, _ in rows] == ["suite", "suite"]
    assert [row["ratio"] is None for _, row in rows] == [False, False]
    assert rows[0][1] == shown[0]
    referee.present(Benchmark(), "another", "a", build, roofs)
    assert len(built) == 2


def test_disagreement_fails_and_absence_skips_the_test():
    def absent():
        raise protocol.Absent("needs a moon")

    rows = []
    referee = races.Races(CPU, 0.0, True, lambda suite, **row: rows.append(row))
    case = contest(
        provider("good", lambda: None),
        provider("wrong", lambda: None, error=1.0),
        provider("absent", None, prepare=absent),
    )
    with pytest.raises(pytest.fail.Exception, match="wrong: disagrees with the truth"):
        referee.present(Benchmark(), 1, "wrong", lambda: case, roofs)
    with pytest.raises(pytest.skip.Exception, match="needs a moon"):
        referee.present(Benchmark(), 1, "absent", lambda: case, roofs)
    assert rows == []
    # one round each in a smoke run
    found = referee.present(Benchmark(), 1, "good", lambda: case, roofs)
    assert found["rounds"] == 1
    assert found["baseline"] == "good"


def test_a_case_that_cannot_be_built_is_skipped():
    built = []

    def build():
        built.append(1)
        raise protocol.Absent("needs two moons")

    referee = races.Races(CPU, 0.0, True, lambda suite, **row: None)
    for name in ("a", "b"):
        with pytest.raises(pytest.skip.Exception, match="needs two moons"):
            referee.present(Benchmark(), 1, name, build, roofs)
    # which may take long: once is enough
    assert len(built) == 1

    def fail():
        built.append(1)
        raise RuntimeError("out of memory")

    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="out of memory"):
            referee.present(Benchmark(), 2, name, fail, roofs)
    assert len(built) == 2
    found = referee.present(
        Benchmark(), 3, "a", lambda: contest(provider("a", lambda: None)), roofs
    )
    assert found["provider"] == "a"


def test_whoever_fails_while_it_is_timed_leaves_the_others():
    calls = []

    def run():
        calls.append(1)
        # agreed, and kept what later rounds need
        if len(calls) > 3:
            raise RuntimeError("out of\nmemory")

    found = protocol.race([provider("one", run), provider("two", lambda: None)], CPU, seconds=0)
    assert found["one"].failure == "RuntimeError: out of memory"
    assert not found["one"].counts
    assert len(found["two"].seconds) == 3


def test_the_first_baseline_that_ran_counts():
    referee = races.Races(CPU, 0.0, True, lambda suite, **row: None)
    case = contest(
        provider("wrong", lambda: None, error=1.0),
        provider("first", lambda: None),
        provider("second", lambda: None),
    )
    found = referee.present(Benchmark(), 1, "second", lambda: case, roofs)
    assert found["baseline"] == "first"
    nobody = contest(provider("wrong", lambda: None, error=1.0))
    nobody = dataclasses.replace(nobody, providers=[*nobody.providers, provider("x", lambda: None)])
    found = referee.present(Benchmark(), 2, "x", lambda: nobody, roofs)
    assert found["baseline"] is None
    assert found["ratio"] is None
