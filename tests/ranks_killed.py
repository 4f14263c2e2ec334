"""Features made by several processes, of which some are killed at random; and by 1, 2, 3 and 5.

``python ranks_killed.py FOLDER KILLS``: forks, so that everything is imported once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from test_features import make_data
from test_sketcher import small_unet

from dtrak.features import extraction
from dtrak.features import store as stores
from dtrak.features.extraction import FusedExtractor, fill_store, open_store
from dtrak.features.settings import FeatureSettings
from dtrak.features.store import FeatureStore
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.ranks import LAUNCHER
from dtrak_kernels import Projection

ROWS = 150
CPU = torch.device("cpu")
SETTINGS = FeatureSettings("mean_squared_l2_norm", (0, 500), 0, Projection("sjlt", 256))


def start(folder, rank, world, data):
    """One process of several, which stands for one that a launcher started."""
    child = os.fork()
    if child:
        return child
    os.environ |= dict(zip(LAUNCHER, map(str, (rank, world, rank, world)), strict=True))
    extractor = FusedExtractor(UNet(small_unet().float(), linear_process()), SETTINGS, CPU)
    store = open_store(folder, extractor, data, "train", lambda: 4)
    fill_store(store, extractor, data, role="train/")
    os._exit(0)


def finish(children):
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


def main(folder, kills):
    # several shards, and several parts of each
    stores._ROWS_PER_SHARD, extraction.ROWS_PER_PART = 16, 8
    torch.set_num_threads(1)
    data, found = make_data(ROWS), {}
    for world in (1, 2, 3, 5):
        place = folder / str(world)
        finish([start(place, rank, world, data) for rank in range(world)])
        found[world] = FeatureStore.read(place).load()
        assert torch.equal(found[world], found[1]), world
    draw = random.Random(0)
    place = folder / "killed"
    children, killed = [], 0
    while killed < kills:
        if place.is_dir() and not FeatureStore.read(place).missing():
            # all is made: begin again, but for one shard
            FeatureStore.read(place).file(draw.randrange(10)).unlink()
        while len(children) < 3:
            children.append(start(place, len(children), 3, data))
        time.sleep(draw.uniform(0.05, 0.6))
        victim = children.pop(draw.randrange(3))
        os.kill(victim, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(victim, 0)[1])
        # whoever has ended by itself makes room
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    finish(children)
    finish([start(place, rank, 2, data) for rank in range(2)])
    store = FeatureStore.read(place)
    assert torch.equal(store.load(), found[1])
    # nothing of what was killed is left but what an unfinished write left beside
    assert not list(place.glob("*-from-*.safetensors"))
    print(f"{killed} killed, the same bits")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
