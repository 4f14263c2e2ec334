"""Find launch configurations on this machine's GPU and write them where the kernels look.

    python benchmarks/tune.py                        every operation, into the package
    python benchmarks/tune.py --operation gram_product --out out/configs

One file per operation, ``kernels/dtrak_kernels/configs/<operation>.json``: device name -> list of
``{"sizes": ..., "config": ...}``, which `dtrak_kernels.tuning` reads. A search goes from the
default one field at a time; a configuration counts only if it launches, gives the default's result
and is faster. Entries of other devices and sizes are kept. ``tests/test_compile.py`` compiles every
entry of the package for its card, and refuses what spills or does not fit.

``--smoke`` searches tiny sizes, also interpreted: a rehearsal whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# read once, when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dtrak_kernels import Projection
from dtrak_kernels.gram_kernel import DEFAULT_CONFIG, launch_gram_product
from dtrak_kernels.projection import Config, default_config, launch_project
from dtrak_kernels.tuning import CONFIGS

OPERATIONS = ("project_rademacher", "project_normal", "gram_product")
# a candidate must win by this much: timings of equals scatter
MARGIN = 0.97
ALLOWED_ERROR = 1e-5


@dataclass(frozen=True)
class Problem:
    """A size of an operation.

    Attributes:
        operation: stem of the file.
        sizes: what the entry is found by.
        default: the configuration to begin with.
        choices: values of each field, in the order they are tried.
        run: gives the operation's result under a configuration.
    """

    operation: str
    sizes: dict[str, int]
    default: dict[str, Any]
    choices: dict[str, tuple[Any, ...]]
    run: Callable[[dict[str, Any]], Tensor]


def arch_of(device: torch.device) -> int | str:
    """What default configurations go by."""
    if device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName
    return 10 * properties.major + properties.minor


def dense_problems(kind: str, device: torch.device, *, smoke: bool) -> Iterator[Problem]:
    """Batches of gradients, in the dtype their kernel likes best."""
    sizes = (
        [(3, 512, 64)] if smoke else [(B, 2**20, K) for B in (8, 32, 128) for K in (4096, 32768)]
    )
    default = Config(16, 64, splits=2) if smoke else default_config(arch_of(device))
    wide = device.type != "cuda" or kind == "normal"
    for B, P, K in sizes:
        generator = torch.Generator(device).manual_seed(0)
        grads = torch.randn(B, P, device=device, generator=generator)
        grads = grads.to(torch.float16 if wide else torch.bfloat16)
        projection = Projection(kind, K, 1)

        def run(
            config: dict[str, Any], grads: Tensor = grads, projection: Projection = projection
        ) -> Tensor:
            out = torch.zeros(len(grads), projection.proj_dim, device=grads.device)
            return launch_project(grads, projection, 0, out, Config(**config))

        choices: dict[str, tuple[Any, ...]] = {
            "block_b": (16, 32, 64, 128, 256),
            "block_k": (64, 128, 256),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4),
            "splits": (0, 1, 2, 4, 8, 16),
        }
        if smoke:
            choices = {"block_b": (16, 32), "splits": (2, 3)}
        yield Problem(f"project_{kind}", {"B": B, "P": P, "K": K}, asdict(default), choices, run)


def gram_problems(device: torch.device, *, smoke: bool) -> Iterator[Problem]:
    """Features of a data set, and a few or many vectors."""
    sizes = [(40, 70, 5)] if smoke else [(5000, 32768, M) for M in (16, 128)]
    for N, K, M in sizes:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(N, K, device=device, generator=generator)
        vectors = torch.randn(K, M, device=device, generator=generator)

        def run(
            config: dict[str, Any], features: Tensor = features, vectors: Tensor = vectors
        ) -> Tensor:
            return launch_gram_product(features, vectors, 0.1, config=config)

        choices: dict[str, tuple[Any, ...]] = {
            "BLOCK_N": (16, 32, 64),
            "BLOCK_K": (32, 64, 128),
            "BLOCK_M": (16, 32, 64),
            "num_warps": (4, 8),
            "num_stages": (1, 2, 3),
        }
        if smoke:
            choices = {"BLOCK_N": (16, 32)}
        yield Problem("gram_product", {"N": N, "K": K, "M": M}, DEFAULT_CONFIG, choices, run)


def make_problems(operation: str, device: torch.device, *, smoke: bool) -> Iterator[Problem]:
    """The sizes an operation is tuned at."""
    if operation == "gram_product":
        return gram_problems(device, smoke=smoke)
    return dense_problems(operation.removeprefix("project_"), device, smoke=smoke)


def measure(run: Callable[[], Any], rounds: int = 7) -> float:
    """Median seconds, after a run that compiles."""
    seconds = []
    for number in range(rounds + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[rounds // 2]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def search(
    problem: Problem,
    deadline: float,
    *,
    timer: Callable[[Callable[[], Any]], float] = measure,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Any], float, float]:
    """The best configuration found before ``deadline``, its seconds and the default's.

    Args:
        problem: what to tune.
        deadline: on ``clock``; the default is measured in any case.
        timer: gives the seconds of a call.
        clock: tells the time.
    """
    best = dict(problem.default)
    expected = problem.run(best)
    first = fastest = timer(lambda: problem.run(best))
    for name, values in problem.choices.items():
        for value in values:
            candidate = best | {name: value}
            if value == best[name]:
                continue
            if clock() >= deadline:
                return best, fastest, first
            try:
                if not relative_error(problem.run(candidate), expected) <= ALLOWED_ERROR:
                    continue
                seconds = timer(lambda candidate=candidate: problem.run(candidate))
            # too large for the card in any of many ways: not a candidate
            except Exception:
                continue
            if seconds < MARGIN * fastest:
                best, fastest = candidate, seconds
    return best, fastest, first


def store(folder: Path, problem: Problem, device_name: str, config: dict[str, Any]) -> Path:
    """Write an entry, in place of the one of the same device and sizes."""
    file = folder / f"{problem.operation}.json"
    entries = json.loads(file.read_text()) if file.exists() else {}
    of_device = [e for e in entries.get(device_name, []) if e["sizes"] != problem.sizes]
    of_device.append({"sizes": problem.sizes, "config": config})
    entries[device_name] = sorted(of_device, key=lambda entry: sorted(entry["sizes"].items()))
    folder.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    fresh.replace(file)
    return file


def main() -> int:
    """Tune what was asked for; 1 if an operation could not even run, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operation", choices=OPERATIONS, action="append")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="folder of the files")
    parser.add_argument("--seconds", type=float, default=30.0, help="per size")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        sys.stderr.write("tuning needs a GPU, there is none here; --smoke rehearses it\n")
        return 2
    if options.smoke and options.out == CONFIGS:
        sys.stderr.write("--out must be given with --smoke: its times mean nothing\n")
        return 2
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    failures = 0
    for operation in options.operation or OPERATIONS:
        for problem in make_problems(operation, device, smoke=options.smoke):
            sizes = ", ".join(f"{key} {size:,}" for key, size in problem.sizes.items())
            try:
                best, fastest, first = search(problem, time.monotonic() + options.seconds)
            except Exception as error:
                failures += 1
                sys.stdout.write(f"{operation} {sizes}: {type(error).__name__}: {error}\n")
                continue
            # stored as soon as it is known
            store(options.out, problem, name, best)
            changed = {k: v for k, v in best.items() if v != problem.default[k]}
            sys.stdout.write(
                f"{operation} {sizes}: {1e3 * first:.3f} ms by default, "
                f"{1e3 * fastest:.3f} ms with {changed or 'the default'}\n"
            )
            sys.stdout.flush()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
