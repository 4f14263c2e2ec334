"""A job for `dtrak.runs.workers` in a module that a new process imports quickly."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrak.runs.files import claim


@dataclass(frozen=True)
class Write:
    """Write a file per name, with the process that did it; refuse or die at one of them."""

    folder: Path
    refused: str = ""
    deadly: str = ""

    def __call__(self, worker):
        def job(name, progress):
            file = self.folder / name
            with claim(self.folder / "locks" / name) as ours:
                if not ours or file.exists():
                    return False
                if name == self.refused:
                    raise ValueError(f"{name} must be\nsomething else")
                if name == self.deadly:
                    os._exit(7)
                progress(1, 2)
                # the other process comes up meanwhile
                time.sleep(0.2 if worker else 0.5)
                file.write_text(f"{os.getpid()} {torch.get_num_threads()}")
                progress(2, 2)
                return True

        return job
