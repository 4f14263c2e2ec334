"""A ridge solver whose rows are divided among processes, beside one that has them all.

``python ridge_in_parts.py FOLDER WORLD…``: forks, so that torch is imported once.
"""

import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from dtrak_kernels.ridge import RidgeSolver

DAMPINGS = (1e-9, 0.3, 20.0)
# (N, K, method): more rows than features and fewer; fewer rows than processes
CASES = [(57, 12, "primal"), (9, 12, "dual"), (57, 12, "cg"), (57, 12, "svd"), (9, 12, "svd"),
         (4, 3, None)]  # fmt: skip


def make(N, K):
    generator = torch.Generator().manual_seed(N)
    rows = torch.randn(N, K, generator=generator)
    # two equal rows, in different processes, and one of zeros
    rows[-1] = rows[0]
    rows[1] = 0
    return rows, torch.randn(5, K, generator=generator), torch.randn(N, 2, generator=generator)


def everything(features, queries, targets, method, group=None, budget=2**33):
    """What a solver answers; rows and columns of this process's training rows are named so."""
    solver = RidgeSolver(features, method=method, group=group, memory_budget=budget)
    least = 0 if method == "svd" else 1
    found = {}
    for damping in DAMPINGS[least:]:
        found[f"columns scores {damping}"] = solver.scores(queries, damping)
        found[f"rows preconditioned {damping}"] = solver.preconditioned(damping)
        found[f"inverse {damping}"] = solver.inverse_times(queries, damping)
        best = solver.top_k(queries, 3, damping)
        found |= {f"{field.name} {damping}": getattr(best, field.name) for field in fields(best)}
        if method == "cg":
            continue
        found[f"rows leverages {damping}"] = solver.leverages(damping)
        found[f"rows norms {damping}"] = solver.preconditioned_norms(damping)
        found[f"rows left out {damping}"] = solver.leave_one_out_residuals(targets, damping)
    sweep = solver.iter_sweep(queries, DAMPINGS[least:])
    found |= {f"columns sweep {number}": scores for number, scores in enumerate(sweep)}
    found["mean"] = torch.tensor(solver.mean_squared_norm())
    if method != "cg":
        found["auto"] = torch.tensor(solver.auto_damping())
        found["rank"] = torch.tensor(solver.rank())
    return found


def part_of(folder, rank, world):
    """One process: every case, and what it found into a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
    )
    answers = []
    for N, K, method in CASES:
        features, queries, targets = make(N, K)
        # in unequal parts: the first gets the least, and none of four rows
        edges = [N * r * r // world**2 for r in range(world + 1)]
        own = slice(edges[rank], edges[rank + 1])
        # so little memory that blocks are of few rows
        budget = 8 * 8 * 3 * K if method == "dual" else 2**33
        found = everything(features[own], queries, targets[own], method, dist.group.WORLD, budget)
        answers.append(found)
    torch.save(answers, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def main(folder, worlds):
    torch.set_num_threads(1)
    alone = []
    for N, K, method in CASES:
        alone.append(everything(*make(N, K), method))
    for world in worlds:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                part_of(folder, rank, world)
                os._exit(0)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        parts = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for case, (expected, *found) in zip(CASES, zip(alone, *parts, strict=True), strict=True):
            for name, value in expected.items():
                several = [part[name] for part in found]
                if name.startswith(("columns", "rows")):
                    joined = torch.cat(several, dim=int(name.startswith("columns")))
                else:
                    joined = several[0]
                    assert all(torch.equal(joined, other) for other in several), (case, name)
                assert joined.shape == value.shape, (case, name, world)
                if not value.is_floating_point():
                    assert torch.equal(joined, value), (case, name, world)
                    continue
                error = (joined - value).double().norm() / value.double().norm().clamp(min=1e-12)
                assert error < 1e-6, (case, name, world, float(error))
        print(world, "processes agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
