"""One list of models, worked through by one process or by several."""

import os

import pytest
import torch
from lds_jobs import Write

from dtrak.runs.workers import one_thread, work

NAMES = [f"{number}" for number in range(6)]


# slow with two: the case of a dead process starts some in the fast lane
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_every_model_is_done_once_and_reported(tmp_path, processes):
    reports = []
    report = lambda *what: reports.append(what)
    assert work(Write(tmp_path), NAMES, processes, report) == 6
    assert sorted(reports) == sorted((name, done, 2) for name in NAMES for done in (1, 2))
    found = [(tmp_path / name).read_text().split() for name in NAMES]
    assert {threads for _, threads in found} == {"1"}
    assert len({process for process, _ in found}) == processes
    assert (str(os.getpid()) in {process for process, _ in found}) == (processes == 1)
    # a second call finds nothing to do
    assert work(Write(tmp_path), NAMES, 1, report) == 0


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_refusal_reaches_the_caller_and_keeps_what_was_done(tmp_path, processes):
    with pytest.raises(ValueError, match=r"3 must be\s+something else"):
        work(Write(tmp_path, refused="3"), NAMES, processes, lambda *_: None)
    assert any((tmp_path / name).exists() for name in NAMES)


def test_no_process_is_started_without_a_model(tmp_path):
    # it would be a process of its own, were it not the only one that has work
    assert work(Write(tmp_path), NAMES[:1], 3, lambda *_: None) == 1
    assert (tmp_path / NAMES[0]).read_text().split()[0] == str(os.getpid())


def test_a_dead_process_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="a worker died with exit code 7"):
        work(Write(tmp_path, deadly="2"), NAMES, 2, lambda *_: None)


def test_threads_are_given_back():
    before = torch.get_num_threads()

    def fail():
        with one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        work(Write(tmp_path), NAMES, 0, lambda *_: None)
