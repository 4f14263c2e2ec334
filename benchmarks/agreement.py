"""Every Triton kernel against the reference, in every dtype: one row per case.

``python benchmarks/agreement.py --out OUT`` runs all of them on this machine's GPU, or interpreted
where there is none; ``--kernel NAME`` one kernel, ``--smoke`` the small cases. A case that fails
does not stop the others, and every row is written as soon as it is known.

A kernel agrees when it errs at most twice as much as eager float32 torch does on the same inputs,
both measured against float64, and gives the same bits when it is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

# read once, when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dtrak_kernels import Projection, project_
from dtrak_kernels.dense import reference
from dtrak_kernels.gradients.weight import LayerGradient, weight_grads
from dtrak_kernels.ridge.gram import gram_product
from dtrak_kernels.sjlt.torch import ParameterSketch

KERNELS = ("rademacher", "normal", "sketch", "gram_product")
# what no interpreter can do comes first
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# twice the error of eager float32, and never less than its rounding
SLACK, FLOOR = 2.0, 1e-6
SEED, OFFSET = 2**40 + 7, 37
NO_BF16 = "the interpreter multiplies bfloat16 wrongly"


@dataclass(frozen=True)
class Case:
    """A kernel on one problem.

    Attributes:
        kernel: one of `KERNELS`.
        dtype: of its inputs.
        shape: the problem, in words.
        run: what the kernel gives on a device.
        eager: float32 torch on a CPU, on the same inputs.
        oracle: float64 on a CPU, on the same inputs.
    """

    kernel: str
    dtype: torch.dtype
    shape: str
    run: Callable[[torch.device], Tensor]
    eager: Callable[[], Tensor]
    oracle: Callable[[], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normals that do not depend on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_cases(kind: str, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """A whole aligned tile; ragged in every way, far beyond 2**32; one row; many spans."""
    shapes = [(16, 512, 64, 256), (37, 530, 70, 2**40 + 5), (1, 64, 16, 1000)]
    if not small:
        shapes += [(33, 40_000, 300, 77), (200, 9_000, 513, 2**33 - 1000)]
    make = getattr(reference, f"{kind}_matrix")
    for B, C, K, offset in shapes:
        grads, projection = random(B, C).to(dtype), Projection(kind, K, SEED)

        def run(
            device: torch.device, grads: Tensor = grads, p: Projection = projection, o: int = offset
        ) -> Tensor:
            out = torch.zeros(len(grads), p.proj_dim, device=device)
            return project_(grads.to(device), p, offset=o, out=out, implementation="triton")

        matrix = partial(make, C, K, SEED, offset=offset)
        yield Case(
            kind,
            dtype,
            f"B {B}, C {C:,}, K {K}, from {offset:,}",
            run,
            lambda g=grads, m=matrix: reference.project(g.float(), m()),
            lambda g=grads, m=matrix: reference.project(g.double(), m()),
        )


def sketch_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Layers of a U-Net and awkward ones, channels first and last, two rows to a sample."""
    layers: list[tuple[str, nn.Module, tuple[int, ...], int]] = [
        ("conv 3x3, 3 channels", nn.Conv2d(3, 20, 3, padding=1), (4, 3, 5, 6), 1500),
        ("conv 3x3, stride 2", nn.Conv2d(32, 17, 3, stride=2, padding=1), (4, 32, 5, 6), 1024),
        ("conv 3x3, 5 groups", nn.Conv2d(10, 35, 3, groups=5), (4, 10, 5, 6), 300),
        ("linear", nn.Linear(40, 33), (4, 7, 40), 512),
    ]
    if not small:
        layers += [
            ("conv 3x3, 128 to 256", nn.Conv2d(128, 256, 3, padding=1), (4, 128, 16, 16), 32768),
            ("conv 1x1, 256 to 256", nn.Conv2d(256, 256, 1), (4, 256, 8, 8), 32768),
            ("linear, 512 to 256", nn.Linear(512, 256), (20, 512), 32768),
        ]
    for name, layer, shape, proj_dim in layers:
        for is_last in (False, True) if len(shape) == 4 else (False,):
            x = random(*shape)
            delta = random(*layer(x).shape, seed=1)
            x, delta = x.to(dtype), delta.to(dtype)
            if is_last:
                x, delta = (a.contiguous(memory_format=torch.channels_last) for a in (x, delta))
            weight = tuple(layer.weight.shape)
            yield Case(
                "sketch",
                dtype,
                name + (", channels last" if is_last else ""),
                partial(_run_sketch, layer, x, delta, proj_dim),
                partial(_sketch, layer, x.float(), delta.float(), weight, proj_dim),
                partial(_sketch, layer, x.double(), delta.double(), weight, proj_dim),
            )


def _run_sketch(
    layer: nn.Module, x: Tensor, delta: Tensor, proj_dim: int, device: torch.device
) -> Tensor:
    from dtrak_kernels.sjlt.triton import launch_sketch

    sketch = ParameterSketch(tuple(layer.weight.shape), OFFSET, proj_dim, SEED)
    out = torch.zeros(len(x) // 2, proj_dim, device=device)
    return launch_sketch(layer.to(device), x.to(device), delta.to(device), sketch, out, 2)


def _sketch(
    layer: nn.Module, x: Tensor, delta: Tensor, weight: tuple[int, ...], proj_dim: int
) -> Tensor:
    """The weight's gradient, then its sketch: the torch path, which the tests judge."""
    sketch = ParameterSketch(weight, OFFSET, proj_dim, SEED)
    out = torch.zeros(len(x) // 2, proj_dim, dtype=x.dtype)
    gradient = LayerGradient(layer.cpu(), x, delta, 2)
    for part in weight_grads(gradient, all_samples=False, row_multiple=sketch.tile[0]):
        sketch.add_matrix(part.grads, out[part.samples], part.rows.start)
    return out


def gram_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Fewer rows than a block; many parts."""
    shapes = [(7, 40, 3), (50, 130, 33)]
    if not small:
        shapes += [(5000, 4096, 64)]
    for N, K, M in shapes:
        features, vectors = random(N, K).to(dtype), random(K, M, seed=1)
        yield Case(
            "gram_product",
            dtype,
            f"N {N:,}, K {K:,}, M {M}",
            lambda device, f=features, v=vectors: gram_product(
                f.to(device), v.to(device), 0.1, implementation="triton"
            ),
            lambda f=features, v=vectors: f.float().T @ (f.float() @ v) + 0.1 * v,
            lambda f=features, v=vectors: f.double().T @ (f.double() @ v.double()) + 0.1 * v,
        )


def make_cases(kernel: str, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """The cases of a kernel in a dtype."""
    if kernel == "sketch":
        return sketch_cases(dtype, small=small)
    if kernel == "gram_product":
        return gram_cases(dtype, small=small)
    return dense_cases(kernel, dtype, small=small)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """‖actual − oracle‖ / ‖oracle‖ in float64."""
    actual = actual.detach().cpu().double()
    return float((actual - oracle).norm() / oracle.norm())


def judge(case: Case, device: torch.device) -> dict[str, object]:
    """Run a case: its row."""
    row: dict[str, object] = {
        "kernel": case.kernel,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
    }
    oracle = case.oracle()
    allowed = max(FLOOR, SLACK * relative_error(case.eager(), oracle))
    begin = time.perf_counter()
    first, again = case.run(device), case.run(device)
    error = relative_error(first, oracle)
    row |= {"error": error, "allowed": allowed, "seconds": time.perf_counter() - begin}
    if not torch.equal(first, again):
        return row | {"status": "failed", "note": "another run gives other bits"}
    # not `>`: NaN is no agreement
    if not error <= allowed:
        return row | {"status": "failed", "note": f"error {error:.1e} > {allowed:.1e}"}
    return row | {"status": "passed", "note": ""}


def is_multiplied_wrongly(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the interpreter cannot do it: only these kernels multiply bfloat16 as such."""
    return device.type != "cuda" and dtype == torch.bfloat16 and kernel in ("rademacher", "sketch")


def main() -> int:
    """Run the cases that were asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the rows, agreement.jsonl")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--smoke", action="store_true", help="small cases only")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.smoke or device.type == "cpu"
    failures = 0
    lost = ""
    for kernel in options.kernel or KERNELS:
        for dtype in DTYPES:
            skipped = is_multiplied_wrongly(kernel, dtype, device)
            for case in make_cases(kernel, dtype, small=small):
                row: dict[str, object] = {
                    "kernel": kernel,
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": case.shape,
                }
                if lost or skipped:
                    row |= {"status": "skipped", "note": NO_BF16 if skipped else lost}
                else:
                    try:
                        row = judge(case, device)
                    # whatever one case does, the others are tried
                    except Exception as error:
                        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                        row |= {"status": "failed", "note": text[:300]}
                        if "CUDA error" in text:
                            # nothing runs in this process any more
                            lost = f"the device was lost in {kernel}, {case.shape}"
                failures += row["status"] == "failed"
                row["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
                text = f"{row['kernel']:13} {row['dtype']:9} {row['shape']:44} {row['status']}"
                sys.stdout.write(f"{text} {row.get('note') or ''}\n")
                sys.stdout.flush()
                if options.out:
                    options.out.mkdir(parents=True, exist_ok=True)
                    with (options.out / "agreement.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return int(failures > 0 or bool(lost))


if __name__ == "__main__":
    sys.exit(main())
