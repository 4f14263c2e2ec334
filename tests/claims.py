"""Another process that works in an output folder."""

import subprocess
import sys
from contextlib import contextmanager

from dtrak.files import LOCK_FILE

SCRIPT = """
import pathlib, sys
from dtrak.files import claim
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
