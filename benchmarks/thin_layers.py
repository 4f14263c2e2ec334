"""LoRA's many thin layers: what their kernels cost a GPU, what their calls cost the host.

A layer of rank r reads its input and its output's gradient once; both are as long as its tokens.
``python benchmarks/thin_layers.py`` prints, for the LoRA of each kind of model (rank 16, one sample
at S = 10 timesteps), the modelled time of the fused sketch of every layer (see `modelled`: a lower
bound), beside the model's own step at the card's nominal rate, and the processor time that the
hooks of a layer take here, measured with a destination that does nothing. Calls run ahead of the
GPU: they are paid for where they take longer than step and kernels together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from modelled import CARDS, NOTE, cost, sketch_case
from sketch_layers import Layer
from torch import nn

from dtrak_kernels import Accumulator, GradientSketcher

RANK = 16
S = 10


class Model(NamedTuple):
    """A LoRA on query, key, value and output of every attention.

    Attributes:
        step: floating-point operations of a forward of one row; a backward to the layers' inputs
            takes as many.
        layers: width, tokens and how many.
    """

    step: float
    layers: list[tuple[int, int, int]]


# of a transformer, two operations for each parameter and token; of the U-Nets, as published
MODELS = {
    "SD 1.5, 512 px": Model(
        0.68e12, [(320, 4096, 40), (640, 1024, 40), (1280, 256, 40), (1280, 64, 8)]
    ),
    "SDXL, 1024 px": Model(5.98e12, [(640, 4096, 80), (1280, 1024, 480)]),
    "SD3 medium, 1024 px": Model(2 * 2.0e9 * 4429, [(1536, 4096, 96)]),
    "FLUX.1, 1024 px": Model(2 * 11.9e9 * 4608, [(3072, 4096, 76), (3072, 4608, 114)]),
}


class Nowhere(Accumulator):
    """A destination that does nothing with a gradient."""

    def add(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""

    def add_weight(self, *arguments: Any, **options: Any) -> None:
        """Nothing."""


def host_seconds(layers: int = 128, rounds: int = 25) -> tuple[float, float]:
    """Processor seconds per layer of a forward and backward here, without and with hooks."""
    torch.set_num_threads(1)
    network = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(layers)))
    x = torch.randn(1, 2, requires_grad=True)
    sketcher = GradientSketcher(network, into=lambda shapes: Nowhere(shapes, 1))

    def plain() -> None:
        network(x).sum().backward()

    def hooked() -> None:
        sketcher.sketch(lambda: network(x).sum(1), 1)

    def median(run: Callable[[], None]) -> float:
        times = []
        for _ in range(rounds):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return statistics.median(times) / layers

    return median(plain), median(hooked)


def main() -> int:
    """Print a line per layer and a sum per model; write them as rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", choices=CARDS, default="H200")
    parser.add_argument("--out", type=Path, help="folder of the rows, thin_layers.jsonl")
    options = parser.parse_args()
    card = CARDS[options.card]
    plain, hooked = host_seconds()
    call = hooked - plain
    sys.stdout.write(
        f"{card.name}: {NOTE}\nhost: a layer's step takes {1e6 * plain:.0f} us, its hooks "
        f"{1e6 * call:.0f} us more\n"
    )
    for model, (step, layers) in MODELS.items():
        total = count = 0.0
        for width, tokens, times in layers:
            for name, shape in (("down", (RANK, width)), ("up", (width, RANK))):
                layer = Layer(name, shape, tokens, samples=1, timesteps=S)
                parts = cost(sketch_case(layer, card), card)
                limit = max(parts, key=lambda part: parts[part])
                total, count = total + times * parts[limit], count + times
                sys.stdout.write(
                    f"  {name:4} {width:5} @{tokens:<5} x {times:3}: modelled "
                    f"{1e6 * parts[limit]:6.1f} us by {limit}\n"
                )
        row = {
            "model": model, "card": card.name, "note": NOTE, "layers": count,
            "step_seconds": 2 * S * step / card.matrix, "kernel_seconds": total,
            "hook_seconds": count * call,
        }  # fmt: skip
        figures = (f"{key.split('_')[0]} {1e3 * row[key]:.1f} ms" for key in row if "_" in key)
        sys.stdout.write(f"{model}, {count:.0f} layers: {', '.join(figures)}\n")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "thin_layers.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
