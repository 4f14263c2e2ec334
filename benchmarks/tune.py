"""Find launch configurations on this machine's GPU and write them where the kernels look.

    python benchmarks/tune.py                        every operation, into the package
    python benchmarks/tune.py --operation sketch --out out/configs

Takes at most half an hour; ``make tune`` is the same. One file per operation,
``kernels/dtrak_kernels/tuning/configs/<operation>.json``: device name -> list of ``{"sizes": ...,
"config": ...}``, which `dtrak_kernels.tuning` reads. A search goes from the default one field at a
time; a configuration counts only if it launches, gives the default's result and is faster. Entries
of other devices and sizes are kept. ``tests/test_compile.py`` compiles every entry of the package
for its card, and refuses what spills or does not fit.

The search is a process of its own: a configuration that crashes it, hangs or loses the device costs
that configuration, and the search goes on in a new process. What was found is in the file as soon
as it is known; every candidate, with its seconds or why it does not count, is a line of the journal
(``--journal``), from which ``--resume`` goes on.

``--smoke`` searches tiny sizes, also interpreted: a rehearsal whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# read once, when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sketch_layers
from pages import read_rows
from protocol import make_flush, timed

from dtrak_kernels import Projection, tuning
from dtrak_kernels.dense.config import DenseConfig, default_config
from dtrak_kernels.dense.triton import launch_project
from dtrak_kernels.ridge.gram_triton import DEFAULT_CONFIG, launch_gram_product
from dtrak_kernels.sjlt import config as sketch_config
from dtrak_kernels.sjlt.triton import launch_sketch
from dtrak_kernels.tuning import CONFIGS, arch_of

OPERATIONS = ("sketch", "project_rademacher", "project_normal", "gram_product")
# a candidate must win by this much: timings of equals scatter
MARGIN = 0.97
ALLOWED_ERROR = 1e-5
# seconds of silence after which a search is ended: compiling takes some
PATIENCE = 90.0
# exit status of a search whose device does nothing any more
LOST = 3
WORKER = [sys.executable, str(Path(__file__).resolve()), "--worker"]


class DeviceLostError(RuntimeError):
    """After an error of the device nothing runs in this process any more."""


def tried(_: dict[str, Any]) -> str:
    """No reason against any configuration."""
    return ""


@dataclass(frozen=True)
class Problem:
    """A size of an operation.

    Attributes:
        operation: stem of the file.
        sizes: what the entry is found by.
        default: the configuration to begin with.
        choices: values of each field, in the order they are tried.
        run: gives the operation's result under a configuration.
        refuse: why a configuration is not tried, empty if it is.
    """

    operation: str
    sizes: dict[str, int | str]
    default: dict[str, Any]
    choices: dict[str, tuple[Any, ...]]
    run: Callable[[dict[str, Any]], Tensor]
    refuse: Callable[[dict[str, Any]], str] = tried

    def __str__(self) -> str:
        sizes = (
            size if isinstance(size, str) else f"{key} {size:,}" for key, size in self.sizes.items()
        )
        return f"{self.operation} {', '.join(sizes)}"


class Journal:
    """What became of every candidate, a line before it is tried and one after.

    Args:
        file: of the lines; those it holds are known already.
        device_name: whose lines count.
    """

    def __init__(self, file: Path | None = None, device_name: str = "") -> None:
        self.file, self.device_name = file, device_name
        self.known: dict[str, dict[str, Any]] = {}
        for row in [] if file is None else read_rows(file):
            if row.get("device") == device_name:
                self.known[self._key(row["operation"], row["sizes"], row["config"])] = row

    def _key(self, *what: Any) -> str:
        return json.dumps(what, sort_keys=True)

    def find(self, problem: Problem, config: dict[str, Any]) -> dict[str, Any] | None:
        """The line of a candidate that was tried; it ended the search if it has no result."""
        row = self.known.get(self._key(problem.operation, problem.sizes, config))
        if row is not None and "seconds" not in row and "reason" not in row:
            row = row | {"reason": "it ended the process of the search"}
        return row

    def write(self, problem: Problem, config: dict[str, Any], **result: Any) -> dict[str, Any]:
        """Append a line: ``seconds`` or ``reason``, or neither before a candidate is tried."""
        row = {"operation": problem.operation, "sizes": problem.sizes, "config": config, **result}
        row["device"] = self.device_name
        self.known[self._key(problem.operation, problem.sizes, config)] = row
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        return row


def sketch_problems(device: torch.device, *, smoke: bool) -> Iterator[Problem]:
    """Layers of a U-Net and of a LoRA, one for each form and reduction."""
    arch = arch_of(device)
    for layer in sketch_layers.TINY if smoke else sketch_layers.LAYERS:
        form, reduction = layer.form, layer.reduction
        module, x, grads = layer.make(device)

        def run(
            config: dict[str, Any],
            layer: sketch_layers.Layer = layer,
            inputs: tuple[Any, Tensor, Tensor] = (module, x, grads),
        ) -> Tensor:
            out = torch.zeros(layer.samples, layer.proj_dim, device=device)
            chosen = sketch_config.SketchConfig(**config)
            return launch_sketch(*inputs, layer.sketch, out, layer.timesteps, chosen)

        def refuse(
            config: dict[str, Any], form: sketch_config.Form = form, reduction: int = reduction
        ) -> str:
            return sketch_layers.why_not(
                sketch_config.SketchConfig(**config), form, arch, reduction
            )

        yield Problem(
            sketch_config.OPERATION,
            sketch_config.sizes_of(form, reduction),
            asdict(sketch_config.find_config(form, arch, reduction)),
            {"block_t": (16, 32)} if smoke else sketch_layers.CHOICES,
            run,
            refuse,
        )


def dense_problems(kind: str, device: torch.device, *, smoke: bool) -> Iterator[Problem]:
    """Batches of gradients, in the dtype their kernel likes best."""
    sizes = (
        [(3, 512, 64)] if smoke else [(B, 2**20, K) for B in (8, 32, 128) for K in (4096, 32768)]
    )
    default = DenseConfig(16, 64, splits=2) if smoke else default_config(arch_of(device), kind)
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
            return launch_project(grads, projection, 0, out, DenseConfig(**config))

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
    if operation == sketch_config.OPERATION:
        return sketch_problems(device, smoke=smoke)
    if operation == "gram_product":
        return gram_problems(device, smoke=smoke)
    return dense_problems(operation.removeprefix("project_"), device, smoke=smoke)


def measure(run: Callable[[], Any], rounds: int = 7) -> float:
    """Median seconds, after a run that compiles.

    As `protocol` times: a launch takes longer than a small kernel, and only the kernel counts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flush = make_flush(device)
    run()
    return sorted(timed(run, device, flush) for _ in range(rounds))[rounds // 2]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def judge(
    problem: Problem,
    config: dict[str, Any],
    expect: Callable[[], Tensor],
    timer: Callable[[Callable[[], Any]], float],
) -> dict[str, Any]:
    """Seconds of a candidate, or the reason why it does not count.

    Raises:
        DeviceLostError: nothing can be tried in this process any more.
    """
    try:
        error = relative_error(problem.run(config), expect())
        if not error <= ALLOWED_ERROR:
            return {"reason": f"its result differs by {error:.1e}"}
        return {"seconds": timer(lambda: problem.run(config))}
    # too large for the card in any of many ways: not a candidate
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if any(words in reason for words in ("CUDA error", "HIP error", "illegal memory")):
            raise DeviceLostError(reason) from error
        return {"reason": reason}


def search(
    problem: Problem,
    deadline: float,
    *,
    timer: Callable[[Callable[[], Any]], float] = measure,
    clock: Callable[[], float] = time.monotonic,
    journal: Journal | None = None,
    keep: Callable[[dict[str, Any]], Any] = tried,
) -> tuple[dict[str, Any], float, float]:
    """The best configuration found before ``deadline``, its seconds and the default's.

    Args:
        problem: what to tune.
        deadline: on ``clock``; the default is measured in any case.
        timer: gives the seconds of a call.
        clock: tells the time.
        journal: gets a line per candidate; those it has are not tried again.
        keep: is called with the default, then with every better configuration.

    Raises:
        RuntimeError: the default configuration does not run.
        DeviceLostError: nothing can be tried in this process any more.
    """
    journal = journal or Journal()

    @cache
    def expect() -> Tensor:
        return problem.run(problem.default)

    def seconds_of(config: dict[str, Any]) -> float | None:
        row = journal.find(problem, config)
        if row is None:
            is_default = config == problem.default
            reason = "" if is_default else problem.refuse(config)
            if reason:
                row = journal.write(problem, config, reason=reason)
            else:
                journal.write(problem, config)
                try:
                    result = judge(problem, config, expect, timer)
                except DeviceLostError as error:
                    journal.write(problem, config, reason=str(error))
                    raise
                row = journal.write(problem, config, **result)
        if config == problem.default and "seconds" not in row:
            raise RuntimeError(f"the default configuration does not run: {row['reason']}")
        return row.get("seconds")

    best = dict(problem.default)
    first = fastest = seconds_of(best) or 0.0
    keep(best)
    for name, values in problem.choices.items():
        for value in values:
            candidate = best | {name: value}
            if value == best[name]:
                continue
            if clock() >= deadline:
                return best, fastest, first
            seconds = seconds_of(candidate)
            if seconds is not None and seconds < MARGIN * fastest:
                best, fastest = candidate, seconds
                keep(best)
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


def work(options: argparse.Namespace) -> int:
    """Search in this process; 1 if a problem could not even run, `LOST` if the device is gone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    journal = Journal(options.journal, name)
    until = time.monotonic() + 60 * options.minutes
    timer = partial(measure, rounds=1) if options.smoke else measure
    failures = 0
    for operation in options.operation or OPERATIONS:
        for problem in make_problems(operation, device, smoke=options.smoke):
            if time.monotonic() >= until:
                sys.stdout.write(f"no time was left for {problem} and what follows\n")
                return int(failures > 0)
            deadline = min(time.monotonic() + options.seconds, until)

            def keep(config: dict[str, Any], problem: Problem = problem) -> None:
                store(options.out, problem, name, config)

            try:
                best, fastest, first = search(
                    problem, deadline, timer=timer, journal=journal, keep=keep
                )
            except DeviceLostError as error:
                sys.stdout.write(f"{problem}: the device was lost: {error}\n")
                return LOST
            except Exception as error:
                failures += 1
                sys.stdout.write(f"{problem}: {type(error).__name__}: {error}\n")
                continue
            changed = {k: v for k, v in best.items() if v != problem.default[k]}
            sys.stdout.write(
                f"{problem}: {1e3 * first:.3f} ms by default, "
                f"{1e3 * fastest:.3f} ms with {changed or 'the default'}\n"
            )
            sys.stdout.flush()
    return int(failures > 0)


def lines_of(journal: Path) -> int:
    """How far a search has come."""
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def watch(process: subprocess.Popen[bytes], journal: Path) -> int | None:
    """Exit status of a search, None if nothing came of it for `PATIENCE` and it was ended."""
    lines, since = lines_of(journal), time.monotonic()
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if lines_of(journal) != lines:
                lines, since = lines_of(journal), time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                end(process)
                return None


def end(process: subprocess.Popen[bytes]) -> None:
    """Make a search and what it started end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        # one that waits for its driver does not end: nothing waits for it
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def drive(options: argparse.Namespace, arguments: list[str]) -> int:
    """Search in processes of their own until one comes to the end."""
    if not options.resume:
        options.journal.unlink(missing_ok=True)
    until = time.monotonic() + 60 * options.minutes
    while True:
        lines = lines_of(options.journal)
        left = max(0.0, until - time.monotonic()) / 60
        # the last --minutes counts
        command = [*WORKER, *arguments, "--minutes", f"{left:.2f}"]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = watch(process, options.journal)
        except KeyboardInterrupt:
            end(process)
            sys.stdout.write("interrupted; what was found is kept, --resume goes on\n")
            return 130
        if status in (0, 1):
            return status
        what = "hung" if status is None else f"ended with status {status}"
        if lines_of(options.journal) == lines:
            sys.stdout.write(f"the search {what} before it tried anything\n")
            return 1
        sys.stdout.write(f"the search {what}; it goes on after that configuration\n")
        sys.stdout.flush()


def main() -> int:
    """Tune what was asked for; 1 if an operation could not even run, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operation", choices=OPERATIONS, action="append")
    parser.add_argument("--out", type=Path, default=CONFIGS, help="folder of the files")
    parser.add_argument("--seconds", type=float, default=30.0, help="per size")
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything")
    parser.add_argument("--journal", type=Path, default=Path("out/tune.jsonl"), help="its lines")
    parser.add_argument("--resume", action="store_true", help="go on with the journal")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        sys.stderr.write("tuning needs a GPU, there is none here; --smoke rehearses it\n")
        return 2
    if options.smoke and options.out == CONFIGS:
        sys.stderr.write("--out must be given with --smoke: its times mean nothing\n")
        return 2
    if options.worker:
        return work(options)
    # what is there is read before half an hour is spent on what cannot be added to it
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for operation in options.operation or OPERATIONS:
        try:
            tuning.read_entries(options.out / f"{operation}.json", name)
        except ValueError as error:
            sys.stderr.write(f"{options.out}: {error}\n")
            return 2
    # a process started in the background ignores Ctrl-C otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # whoever ends this process means the search, too
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return drive(options, sys.argv[1:])
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
