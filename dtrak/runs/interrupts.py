"""Ctrl-C while a command starts: nothing is to be put away yet, so it ends at once, with 130."""

import os
import signal
import sys


def is_command() -> bool:
    """Whether this process is one of our commands, as far as is known before it is loaded."""
    started = sys.orig_argv[1:]
    if "-m" in started[:-1]:
        return started[started.index("-m") + 1].startswith("dtrak.")
    return os.path.basename(sys.argv[0]).startswith("dtrak-")


def keep_quiet() -> None:
    """End at Ctrl-C without a traceback, until `console.reporting_errors` has more to say."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
