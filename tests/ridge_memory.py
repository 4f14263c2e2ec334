"""What each of several processes holds while it solves from disk, beside what `plan_ridge` states.

``python ridge_memory.py FOLDER WORLD…``: forks, so that torch is imported once. Prints a line for
each form and number of processes. To be run with ``MALLOC_MMAP_THRESHOLD_=65536``, so that the
allocator gives back at once what is freed.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dtrak.features.store import FeatureStore, own_rows
from dtrak.runs.measure import StageClock
from dtrak.runs.ranks import Ranks
from dtrak_kernels.ridge import RidgeSolver, plan, plan_ridge, rows

# (N, K), and M queries; rows of 48 and 32 MB, which whoever held them all would show
SIZES = {"primal": (12288, 1024), "dual": (1024, 2048), "cg": (8192, 1024)}
M, TOP = 64, 10
# blocks of a size that leaves the rest to be seen
rows.BLOCK_BYTES = plan.BLOCK_BYTES = 4 * 2**20
# packing of products, connections, a shard as it is read
BESIDE = 16 * 2**20


def make(folder, N, K):
    store = FeatureStore.open(folder, {}, [str(row) for row in range(N)], K, 1)
    for shard in store.missing():
        part = store.rows(shard)
        generator = torch.Generator().manual_seed(shard)
        store.write(shard, torch.randn(part.stop - part.start, K, generator=generator))


def solve(folder, method, rank, world):
    """One process: top-k of its part of the rows, and the bytes it took."""
    group = None
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{method}-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=300),
        )
        group = dist.group.WORLD
    here = Ranks(rank, world, rank, is_launched=world > 1, is_shared=world > 1)
    store = FeatureStore.read(folder / method)
    queries = torch.randn(M, store.shape[1], generator=torch.Generator().manual_seed(9))
    # what the libraries take once
    RidgeSolver(torch.eye(64), method=method).top_k(torch.eye(64)[:8], TOP, 1.0)
    clock = StageClock(torch.device("cpu"))
    with clock.stage("before"):
        pass
    with clock.stage("solve"):
        solver = RidgeSolver(own_rows(store, here), method=method, group=group)
        solver.top_k(queries, TOP, solver.mean_squared_norm())
    before, solved = clock.stages
    (folder / f"{method}-{world}-{rank}.json").write_text(
        json.dumps(solved.peak_bytes - before.peak_bytes)
    )
    if world > 1:
        dist.destroy_process_group()


def main(folder, worlds):
    torch.set_num_threads(1)
    for method, (N, K) in SIZES.items():
        make(folder / method, N, K)
        stated = plan_ridge(N, K, num_queries=M).peak_bytes[method]
        for world in worlds:
            children = []
            for rank in range(world):
                child = os.fork()
                if child == 0:
                    solve(folder, method, rank, world)
                    os._exit(0)
                children.append(child)
            assert all(os.waitpid(child, 0)[1] == 0 for child in children)
            files = [folder / f"{method}-{world}-{rank}.json" for rank in range(world)]
            held = [json.loads(file.read_text()) for file in files]
            said = ", ".join(f"{each / 1e6:.0f}" for each in held)
            print(f"{method} N={N} K={K} x {world}: {said} MB, stated {stated / 1e6:.0f}")
            assert max(held) <= stated + BESIDE, (method, world, held, stated)
    print("no process holds more than is stated")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
