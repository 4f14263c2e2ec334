"""The tiny LDS, all of it, in a process that a launcher may have started with others."""

import sys
from pathlib import Path

import torch
from tiny_lds import NAME, register

from dtrak.cli.lds import app
from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds import names

DEVICE = ("--device", "cpu")
PARTS = {
    "prepare": ("--num-subsets", 4, "--num-generated", 2, "--num-validation", 3, *DEVICE),
    "train": DEVICE,
    "evaluate": ("--loss-timesteps", 4, "--noise-seeds", 1, "--timesteps", 2, *DEVICE),
}


def main(folder, parts):
    torch.set_num_threads(1)
    register()
    names.METHODS = tuple(m for m in names.METHODS if m.title in ("D-TRAK", "TracInCP", "Random"))
    lds_methods.DEFAULT_PROJ_DIM = {"sjlt": 512, "none": 0}
    for part in parts:
        words = (part, "--preset", NAME, "--output", folder / "run", *PARTS[part])
        app(list(map(str, words)), standalone_mode=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
