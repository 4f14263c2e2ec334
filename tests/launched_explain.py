"""`dtrak.explain` on a store, in a process that a launcher may have started with others.

``python launched_explain.py FOLDER NAME``: scores go to ``FOLDER/NAME-RANK.pt``.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import torch
from test_sketcher import small_unet

import dtrak
from dtrak.features import store as stores
from dtrak.models import unet
from dtrak.models.process import linear_process
from dtrak.runs.ranks import Ranks

HOW = {"timesteps": 1, "proj_dim": 256, "batch_size": 8, "device": "cpu"}


@contextlib.contextmanager
def hold(self, *arguments, real=Ranks.hold):
    """The first process lets the folder go last: the others must wait with their next call."""
    with real(self, *arguments):
        yield
        time.sleep(self.is_launched and self.is_main)


def main(folder, name):
    Ranks.hold = hold
    torch.set_num_threads(1)
    stores._ROWS_PER_SHARD = 8
    model = unet.UNet(small_unet().float(), linear_process())
    pictures = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rank = os.environ.get("RANK", "0")
    # the second call finds the features of the first
    answers = [
        dtrak.explain(model, pictures, queries, store=folder / name, **HOW)
        for queries in (3, pictures[:2])
    ]
    found = {"drawn": answers[0].queries.images, "scores": [one.scores for one in answers]}
    torch.save(found, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
