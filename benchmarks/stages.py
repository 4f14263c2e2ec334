"""The stages of D-TRAK's CIFAR-2 experiment against their budget.

N = 5,000 images, S = 10 timesteps, K = 32,768 features, the U-Net of 38.3 M parameters, with random
weights: what a stage costs does not depend on them. A stage is timed on one batch and multiplied up
to N; the Gram matrix and its 27 dampings are timed whole. Without a GPU, or with ``--smoke``, tiny
sizes stand in, and figures mean nothing but that the code runs.

Without diffusers the U-Net is replaced by its Linear and convolution layers alone, at the sizes in
``cifar2_layers.json``, chained so that gradients flow through all of them. ``--layers`` writes that
file anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# read once, when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dtrak_kernels import GradientSketcher, Projection, RidgeSolver, project

LAYERS = Path(__file__).parent / "cifar2_layers.json"
SEED = 0


@dataclass(frozen=True)
class Budget:
    """What a stage may cost on one H200, in seconds: the model's target, and what was published.

    Attributes:
        stage: its name.
        target: ours.
        published: the published code's, a model as well.
    """

    stage: str
    target: float
    published: str


# the table of the design: models of an H200, none of them measured
BUDGETS = {
    budget.stage: budget
    for budget in (
        Budget("forward and data gradient", 4.0, "vmap"),
        Budget("weight gradients and sjlt", 1.35, "13 + vmap"),
        Budget("dense projection", 21.0, "39 to 300"),
        Budget("Gram and 27 dampings", 1.0, "60 to 75"),
        Budget("total with sjlt", 6.5, "> 320 + vmap"),
        Budget("total with rademacher", 27.0, "> 320 + vmap"),
    )
}


@dataclass(frozen=True)
class Sizes:
    """The experiment.

    Attributes:
        N: training images.
        M: queries.
        S: timesteps of an image.
        K: features.
        batch: images of a batch that is timed.
        dense_batch: gradients that are projected at once.
        dampings: values of λ.
    """

    N: int
    M: int
    S: int
    K: int
    batch: int
    dense_batch: int
    dampings: int


REAL = Sizes(N=5000, M=1000, S=10, K=32768, batch=64, dense_batch=128, dampings=27)
TINY = Sizes(N=6, M=2, S=2, K=512, batch=2, dense_batch=4, dampings=3)


class LayerStack(nn.Module):
    """The Linear and convolution layers of a model, each on an input of its own size.

    Every input depends on the output before it, so the backward is a chain through all layers, and
    costs what those of the model cost.

    Args:
        entries: of `LAYERS`.
    """

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        super().__init__()
        makers = {"linear": nn.Linear, "conv": nn.Conv2d}
        self.layers = nn.ModuleList()
        self.sizes: list[tuple[int, ...]] = []
        for entry in entries:
            for _ in range(entry["count"]):
                self.layers.append(makers[entry["kind"]](**entry["options"]))
                self.sizes.append(tuple(entry["x"]))

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, features]`` of the last layer, from ``x [rows, ...]``."""
        link = x.flatten(1).mean(1)
        for layer, size in zip(self.layers, self.sizes, strict=True):
            shape = (len(x), *(1 for _ in size))
            constant = torch.ones(size, dtype=x.dtype, device=x.device)
            out = layer(constant + link.view(shape))
            link = out.flatten(1).mean(1)
        return out.flatten(1)


def read_layers() -> list[dict[str, Any]]:
    """The layers of the CIFAR-2 U-Net."""
    return json.loads(LAYERS.read_text())["layers"]


def trace_layers() -> list[dict[str, Any]]:
    """The Linear and convolution layers one forward of the real U-Net meets; no weights needed."""
    from dtrak.training.presets import get_preset

    model = get_preset("cifar2").make_model().module
    found: dict[str, dict[str, Any]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        if isinstance(module, nn.Linear):
            kind, names = "linear", ["in_features", "out_features"]
        else:
            kind = "conv"
            names = ["in_channels", "out_channels", "kernel_size", "stride", "padding"]
        options = {name: getattr(module, name) for name in names}
        options["bias"] = module.bias is not None
        entry = {"kind": kind, "options": options, "x": list(args[0].shape[1:])}
        found.setdefault(json.dumps(entry), entry | {"count": 0})["count"] += 1

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return json.loads(json.dumps(list(found.values())))


@dataclass
class Job:
    """A model and a way to run a batch of it.

    Attributes:
        model: in evaluation mode, on the device.
        name: what it is.
        shape: of one row of its input.
        call: ``call(model, x) -> [rows, ...]``.
    """

    model: nn.Module
    name: str
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Tensor]

    def outputs(self, x: Tensor) -> Tensor:
        """D-TRAK's function of every row: the mean square of the output, ``[rows]``."""
        return self.call(self.model, x).float().square().flatten(1).mean(1)


def make_job(device: torch.device, *, tiny: bool) -> Job:
    """The U-Net if diffusers is here, else its layers; a laptop's if ``tiny``."""
    try:
        from dtrak.training.presets import get_preset

        preset = get_preset("digits" if tiny else "cifar2")
        unet = preset.make_model(SEED).module
    except ImportError as error:
        missing = f"without diffusers ({error})"
        entries = read_layers()
        if tiny:
            entries = [e | {"count": 1} for e in entries if math.prod(e["x"]) < 5000][:4]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            stack = LayerStack(entries).to(device).eval()
        stack = stack.to(memory_format=torch.channels_last)
        return Job(stack, f"the layers of the U-Net alone, {missing}", (8,), lambda m, x: m(x))
    unet = unet.to(device).eval().to(memory_format=torch.channels_last)
    channels, size = unet.config.in_channels, unet.config.sample_size

    def call(model: nn.Module, x: Tensor) -> Tensor:
        steps = torch.arange(len(x), device=x.device) * 997 % 1000
        out = model(x.contiguous(memory_format=torch.channels_last), steps)
        return out if isinstance(out, Tensor) else out.sample

    return Job(unet, f"U-Net {preset.name}", (channels, size, size), call)


def timed(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of ``run``, once more to warm up."""
    seconds = []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def precision(device: torch.device) -> Any:
    """16-bit products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def backward_stages(
    job: Job, sizes: Sizes, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """What a batch costs: without weight gradients, with them, and with features instead."""
    rows = sizes.batch * sizes.S
    x = torch.randn(rows, *job.shape, device=device).requires_grad_()

    def step() -> None:
        with precision(device):
            outputs = job.outputs(x)
        outputs.sum().backward()
        x.grad = None
        for parameter in job.model.parameters():
            parameter.grad = None

    scale = sizes.N / sizes.batch
    with frozen(job.model):
        data_gradient = timed(step, device, rounds)
    yield {
        "stage": "forward and data gradient",
        "seconds": data_gradient * scale,
        "batch_seconds": data_gradient,
    }
    whole = timed(step, device, rounds)
    yield {
        "stage": "an ordinary training step",
        "seconds": whole * scale,
        "batch_seconds": whole,
    }
    for kind in ("sjlt", "kronecker"):
        sketcher = GradientSketcher(
            job.model, Projection(kind, sizes.K, SEED), rows_per_sample=sizes.S
        )

        def sketch(sketcher: GradientSketcher = sketcher) -> None:
            def outputs() -> Tensor:
                with precision(device):
                    return job.outputs(x)

            sketcher.sketch(outputs, sizes.batch)
            x.grad = None

        fused = timed(sketch, device, rounds)
        yield {
            "stage": f"features with {kind}",
            "seconds": fused * scale,
            "batch_seconds": fused,
            "steps": fused / whole,
        }
        if kind == "sjlt":
            yield {
                "stage": "weight gradients and sjlt",
                "seconds": (fused - data_gradient) * scale,
                "batch_seconds": fused - data_gradient,
            }


def projection_stages(
    grad_dim: int, sizes: Sizes, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Projection of gradients that exist, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    grads = torch.randn(sizes.dense_batch, grad_dim, device=device, dtype=dtype)
    for kind in ("rademacher", "normal"):
        projection = Projection(kind, sizes.K, SEED)
        seconds = timed(lambda p=projection: project(grads, p), device, rounds)
        yield {
            "stage": "dense projection" if kind == "rademacher" else "dense projection, normal",
            "seconds": seconds * sizes.N / sizes.dense_batch,
            "batch_seconds": seconds,
            "flops_per_second": 2.0 * grads.numel() * sizes.K / seconds,
        }


def solver_stage(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Scores of M queries for every damping, Gram matrix included."""
    features = torch.randn(sizes.N, sizes.K, device=device)
    queries = torch.randn(sizes.M, sizes.K, device=device)
    dampings = torch.logspace(-2, 6, sizes.dampings).tolist()

    def sweep() -> None:
        for scores in RidgeSolver(features).iter_sweep(queries, dampings):
            scores.sum()

    return {"stage": "Gram and 27 dampings", "seconds": timed(sweep, device, 1)}


def main() -> None:
    """Time every stage, each on its own: one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the rows, stages.jsonl")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--layers", action="store_true", help="rewrite cifar2_layers.json")
    options = parser.parse_args()
    if options.layers:
        lines = ",\n".join("  " + json.dumps(entry) for entry in trace_layers())
        LAYERS.write_text(f'{{"model": "cifar2", "layers": [\n{lines}\n]}}\n')
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.smoke or device.type == "cpu"
    sizes = TINY if tiny else REAL
    rounds = 1 if tiny else 3
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    job = make_job(device, tiny=tiny)
    grad_dim = sum(parameter.numel() for parameter in job.model.parameters())
    shared = {
        "model": job.name,
        "grad_dim": grad_dim,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "sizes": vars(sizes),
        "tiny": tiny,
    }
    sys.stdout.write(f"{job.name}, P = {grad_dim:,}, {shared['device']}\n")
    failures, seconds = 0, {}
    for source in (
        backward_stages(job, sizes, device, rounds),
        iter_once(lambda: solver_stage(sizes, device)),
        projection_stages(grad_dim, sizes, device, rounds),
    ):
        try:
            for row in source:
                seconds[row["stage"]] = row["seconds"]
                write(options.out, row | shared)
        # the other stages are worth having
        except Exception as error:
            failures += 1
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            write(options.out, {"stage": "failed", "note": text[:300]} | shared)
    for row in totals(seconds):
        write(options.out, row | shared)
    sys.exit(int(failures > 0))


def iter_once(make: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row, made when it is asked for."""
    yield make()


def totals(seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Sums of stages that were timed."""
    parts = {
        "total with sjlt": ("features with sjlt", "Gram and 27 dampings"),
        "total with rademacher": (
            "an ordinary training step",
            "dense projection",
            "Gram and 27 dampings",
        ),
    }
    for name, stages in parts.items():
        if all(stage in seconds for stage in stages):
            yield {"stage": name, "seconds": sum(seconds[stage] for stage in stages)}


def write(folder: Path | None, row: dict[str, Any]) -> None:
    """Print a row, with its budget, and append it to the file."""
    budget = BUDGETS.get(row["stage"])
    if budget:
        row = row | {"target": budget.target, "published": budget.published}
    if "seconds" in row:
        # a tiny run is no measurement of the budget
        text = f"target {budget.target:g} s" if budget and not row["tiny"] else ""
        if "steps" in row:
            text = f"{row['steps']:.2f} training steps"
        sys.stdout.write(f"{row['stage']:28} {row['seconds']:9.3f} s  {text}\n")
    else:
        sys.stdout.write(f"{row['stage']}: {row['note']}\n")
    sys.stdout.flush()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "stages.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
