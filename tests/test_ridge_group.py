"""Rows divided among processes give what one process with all rows gives."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_parts_of_the_rows_give_what_all_rows_give(tmp_path):
    # three processes, one of them without rows in a case; 2 and 5 are as this
    done = subprocess.run(
        [sys.executable, HERE / "ridge_in_parts.py", tmp_path, "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "3 processes agree\n", done.stderr[-4000:]
