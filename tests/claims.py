"""Another process that works in an output folder."""

import subprocess
import sys
from contextlib import contextmanager

from dtrak.runs.files import LOCK_FILE, claim

SCRIPT = """
import pathlib, sys
from dtrak.runs.files import claim
with claim(pathlib.Path(sys.argv[1]), part=range(int(sys.argv[2]), int(sys.argv[3]))) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


@contextmanager
def claimed_elsewhere(folder, part):
    """Within it, another process has claimed ``part`` of the work in ``folder``."""
    command = [sys.executable, "-c", SCRIPT, folder / LOCK_FILE, str(part.start), str(part.stop)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        yield
    finally:
        other.communicate("")


def check_training_alone(run, failing, folder):
    """One command at a time trains in ``folder``; what is finished is only read."""
    with claim(folder / LOCK_FILE):
        failing(run, "error: another command is at work in")
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    assert run()[0] == 0
    with claim(folder / LOCK_FILE):
        code, output = run()
        assert (code, "already trained" in output) == (0, True)
