"""Work of the kernels that processes of a group share: rows of a solver, the base of an adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def said(script, *words, **environment):
    done = subprocess.run(
        [sys.executable, HERE / script, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_parts_of_the_rows_give_what_all_rows_give(tmp_path):
    # three processes, one of them without rows in a case
    assert said("ridge_in_parts.py", tmp_path, "3") == "3 processes agree\n"


@pytest.mark.full
def test_other_numbers_of_processes(tmp_path):
    assert said("ridge_in_parts.py", tmp_path, "2", "5").count("agree") == 2


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read as Linux says it")
def test_no_process_holds_more_than_is_stated(tmp_path):
    found = said("ridge_memory.py", tmp_path, "1", "2", "4", MALLOC_MMAP_THRESHOLD_="65536")
    assert found.count("stated") == 10


@pytest.mark.full
def test_the_base_of_an_adapter_may_be_sharded(tmp_path):
    assert said("sharded_base.py", tmp_path) == "the features of the whole model\n"
