"""What a kernel should cost, from its compiled code: a model, printed beside measured times.

The code ptxas makes is read instruction by instruction; each is given to the pipe that executes it
and multiplied by how often its loop runs. The time is that of the busiest resource: a pipe, the
issue slots, the matrix units, or memory, all at the card's nominal rates and perfectly overlapped.
So it is a lower bound that no kernel reaches, and it says what limits one. Latencies, bank
conflicts, L2 traffic and clocks under load are not in it.

``python benchmarks/modelled.py`` prints the model of an H200 on any machine; on a GPU, that of the
card it has, and what the same launch takes, with the sum over spans or parts that follows it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

# an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from compile_all import (
    DIVISIBLE,
    PACK,
    PRODUCT,
    REDUCE,
    build_form,
    compile_kernel,
    disassembly,
)
from protocol import make_flush, timed
from sketch_layers import Layer
from triton.backends.compiler import GPUTarget

from dtrak_kernels.dense import config as dense_config
from dtrak_kernels.dense import triton as dense_kernel
from dtrak_kernels.projection import Projection
from dtrak_kernels.ridge import gram_triton as gram_kernel
from dtrak_kernels.sjlt import config as sketch_config
from dtrak_kernels.sjlt import triton as sketch_kernel

NOTE = "a model: compiled instructions and bytes over nominal rates"


@dataclass(frozen=True)
class Card:
    """Nominal rates.

    Attributes:
        name: as it appears in the device's name.
        arch: compute capability times ten.
        processors: streaming multiprocessors.
        clock: hertz, boosted.
        matrix: dense 16-bit floating-point operations per second of the matrix units.
        memory: bytes per second.
        l2: bytes per second from its second cache to the multiprocessors, as others measured it.
        fma: float32 lanes per clock and multiprocessor.

    Source:
        NVIDIA's data sheets, and the throughput table of the CUDA programming guide.
    """

    name: str
    arch: int
    processors: int
    clock: float
    matrix: float
    memory: float
    l2: float
    fma: int

    @property
    def lanes(self) -> dict[str, int]:
        """Lanes per clock and multiprocessor of every pipe, and of the issue slots."""
        return {"issue": 128, "alu": 64, "imad": 64, "fma": self.fma, "xu": 16, "lsu": 32}


CARDS = {
    card.name: card
    for card in (
        Card("A100", 80, 108, 1.41e9, 312e12, 2.0e12, 4.1e12, 64),
        Card("H100", 90, 132, 1.83e9, 989e12, 3.35e12, 7.85e12, 128),
        Card("H200", 90, 132, 1.83e9, 989e12, 4.8e12, 7.85e12, 128),
    )
}

SKETCHED = (
    Layer("conv 3x3 256 @16", (256, 256, 3, 3), 16),
    Layer("conv 3x3 256 @4", (256, 256, 3, 3), 4),
    Layer("linear 512x512", (512, 512), 1),
)

# opcodes by pipe; the first that fits
PIPES = (
    ("matrix", r"(HMMA|HGMMA|IMMA|QGMMA|DMMA|WARPGROUP|UTC)"),
    ("lsu", r"(LD|ST|ATOM|RED|SHFL|MATCH|UTMA|UBLKCP|CCTL)"),
    ("xu", r"(MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV)"),
    ("imad", r"(IMAD|IMUL|IDP)"),
    ("fma", r"(FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2|FSWZADD)"),
    (
        "other",
        r"(U[A-Z0-9]+|R2UR|BRA|BSSY|BSYNC|EXIT|NOP|BAR|DEPBAR|WARPSYNC|CALL|RET|S2R|CS2R|SYNCS|ERRBAR|MEMBAR|YIELD|NANOSLEEP|BPT)",
    ),
)


def pipe_of(instruction: str) -> str:
    """The pipe that executes an instruction; whatever is nothing else is integer logic."""
    opcode = re.sub(r"^@!?U?P[0-9T]+\s+", "", instruction).split(".")[0].split()[0]
    for pipe, pattern in PIPES:
        if re.fullmatch(pattern + r"\w*" if pipe != "other" else pattern, opcode):
            return pipe
    return "alu"


@dataclass
class Loop:
    """A loop of the compiled code, or the whole of it.

    Attributes:
        start: index of its first instruction.
        stop: index after its last.
        own: instructions per pipe outside of inner loops.
        inner: loops inside.
    """

    start: int
    stop: int
    own: Counter[str] = field(default_factory=Counter)
    inner: list[Loop] = field(default_factory=list)

    def total(self, trips: tuple[float, ...]) -> Counter[str]:
        """Executed instructions per pipe and thread; ``trips`` of loops by depth, then 1."""
        result = Counter(self.own)
        for loop in self.inner:
            times = trips[0] if trips else 1.0
            for pipe, count in loop.total(trips[1:]).items():
                result[pipe] += times * count
        return result


def read_loops(sass: str) -> Loop:
    """The loops of a disassembly: a loop is what lies between a backward branch and its target."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    spans: dict[int, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1])
            here = len(instructions)
            # code ends with a branch to itself
            if branch and branch[1] in labels and labels[branch[1]] < here:
                spans[labels[branch[1]]] = max(here + 1, spans.get(labels[branch[1]], 0))
            instructions.append(found[1])
    root = Loop(0, len(instructions))
    for start, stop in sorted(spans.items(), key=lambda span: (span[0], -span[1])):
        parent = root
        while child := next((x for x in parent.inner if x.start <= start < x.stop), None):
            parent = child
        parent.inner.append(Loop(start, min(stop, parent.stop)))

    def count(loop: Loop) -> None:
        for inner in loop.inner:
            count(inner)
        inside = {i for inner in loop.inner for i in range(inner.start, inner.stop)}
        loop.own = Counter(
            pipe_of(instructions[i]) for i in range(loop.start, loop.stop) if i not in inside
        )

    count(root)
    return root


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        name: kernel and problem.
        build: compiles it for a target.
        programs: of the launch.
        warps: of a program.
        trips: how often its loops run, by depth.
        flops: of matrix units, in 16 bits.
        bytes: inputs and outputs, each moved once.
        run: what a GPU is timed on, made there.
    """

    name: str
    build: Callable[[GPUTarget], Any]
    programs: int
    warps: int
    trips: tuple[float, ...]
    flops: float
    bytes: float
    run: Callable[[], Callable[[], Any]]


def pipe_seconds(executed: Counter[str], warps: int, card: Card) -> dict[str, float]:
    """Seconds that pipes of a multiprocessor are busy with that many warps, one after the other."""
    lanes = Counter({pipe: 32.0 * n * warps for pipe, n in executed.items()})
    lanes["issue"] = sum(lanes.values())
    # the multiply-adds of integers share the float pipe
    lanes["fma"] += lanes["imad"]
    return {pipe: lanes[pipe] / rate / card.clock for pipe, rate in card.lanes.items()}


def cost(case: Case, card: Card) -> dict[str, float]:
    """Seconds each resource of the card is busy."""
    built = case.build(GPUTarget("cuda", card.arch, 32))
    executed = read_loops(disassembly("nvdisasm", "-c", cubin=built.asm["cubin"])).total(case.trips)
    # whole programs per multiprocessor: the fullest one decides
    fullest = -(-case.programs // card.processors)
    seconds = pipe_seconds(executed, case.warps * fullest, card)
    imbalance = fullest * card.processors / case.programs
    return seconds | {
        "matrix": case.flops * imbalance / card.matrix,
        "memory": case.bytes / card.memory,
    }


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def splits_of(
    config: dense_config.DenseConfig, tiles: int, blocks: int, plane: int, card: Card
) -> int:
    """As the dense kernels cut parameters into spans on this card."""
    if config.splits:
        return min(config.splits, blocks)
    most = dense_kernel._PARTIAL_BYTES // (4 * plane)
    return max(1, min(2 * card.processors // tiles, blocks, most))


def product_case(kind: str, B: int, C: int, K: int, dtype: torch.dtype, card: Card) -> Case:
    """The matrix product of a dense kind; a float32 gradient, or a normal one, is two rows."""
    config = dense_config.default_config(card.arch, kind)
    rows = 2 * B if dtype == torch.float32 else B
    block_b = min(config.block_b, max(16, 1 << (rows - 1).bit_length()))
    blocks = C // 256
    tiles = ceil_div(K, config.block_k) * ceil_div(rows, block_b)
    splits = splits_of(config, tiles, blocks, rows * K, card)
    span = ceil_div(blocks, splits)
    name = {torch.float32: "fp16", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    name = "fp16" if kind == "normal" else name

    def run() -> Callable[[], Any]:
        value = torch.float16 if name == "fp16" else torch.bfloat16
        values = torch.randn(rows, C, device="cuda", dtype=value)
        factor, out = torch.ones(B, device="cuda"), torch.zeros(B, K, device="cuda")
        matrix = Projection(kind, K, 1)
        return partial(dense_kernel._accumulate, values, factor, out, matrix, 0, config)

    return Case(
        f"{kind} B {B}, C {C:,}, K {K}, {str(dtype)[6:]}",
        partial(
            compile_kernel,
            getattr(dense_kernel, f"_{kind}_partial_kernel"),
            PRODUCT.format(dtype=name),
            {"BLOCK_B": block_b, "BLOCK_K": config.block_k},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
        programs=tiles * splits,
        warps=config.num_warps,
        # a step of the normal kernel is 64 parameters, of the other 256
        trips=(span * (4 if kind == "normal" else 1),),
        flops=2.0 * rows * C * K * (2 if kind == "normal" else 1),
        bytes=2.0 * rows * C + 8.0 * splits * rows * K + 8.0 * B * K,
        run=run,
    )


def pack_case(B: int, C: int) -> Case:
    """Float32 gradients into two rows of float16."""

    def run() -> Callable[[], Any]:
        grads, scale = torch.randn(B, C, device="cuda"), torch.ones(B, device="cuda")
        values = torch.empty(2 * B, C, device="cuda", dtype=torch.float16)
        return lambda: dense_kernel._pack_kernel[(C // 1024, B)](
            grads_ptr=grads,
            scale_ptr=scale,
            values_ptr=values,
            B=B,
            C=C,
            start=0,
            stride_gb=C,
            stride_vb=C,
            IS_SPLIT=True,
            BLOCK_C=1024,
        )

    return Case(
        f"pack B {B}, C {C:,}, float32",
        partial(
            compile_kernel,
            dense_kernel._pack_kernel,
            PACK.format(dtype="fp32"),
            {"IS_SPLIT": True, "BLOCK_C": 1024},
        ),
        programs=B * C // 1024,
        warps=4,
        trips=(),
        flops=0.0,
        bytes=8.0 * B * C,
        run=run,
    )


def reduce_case(B: int, K: int, splits: int) -> Case:
    """Partial sums of spans into features."""

    def run() -> Callable[[], Any]:
        partials = torch.randn(splits, B, K, device="cuda")
        factor, out = torch.ones(B, device="cuda"), torch.zeros(B, K, device="cuda")
        return lambda: dense_kernel._reduce_kernel[(ceil_div(K, 1024), B)](
            partial_ptr=partials,
            factor_ptr=factor,
            out_ptr=out,
            B=B,
            K=K,
            splits=splits,
            stride_ps=partials.stride(0),
            stride_ob=K,
            IS_SPLIT=False,
            BLOCK_K=1024,
        )

    return Case(
        f"reduce B {B}, K {K}, {splits} spans",
        partial(
            compile_kernel,
            dense_kernel._reduce_kernel,
            REDUCE,
            {"IS_SPLIT": False, "BLOCK_K": 1024},
        ),
        programs=B * ceil_div(K, 1024),
        warps=4,
        trips=(splits,),
        flops=0.0,
        bytes=4.0 * splits * B * K + 8.0 * B * K,
        run=run,
    )


def sketch_case(layer: Layer, card: Card, device_name: str = "") -> Case:
    """A layer's gradient and its sketch, as `launch_sketch` launches it on the card."""
    sketch, form = layer.sketch, layer.form
    (BM, BN), (rows, channels) = sketch.tile, layer.shape[:2]
    tiles, used = math.prod(sketch.grid), min(sketch.num_blocks, math.prod(sketch.grid))
    config = sketch_config.find_config(form, card.arch, layer.reduction, device_name)
    positions = layer.reduction // layer.timesteps

    def run() -> Callable[[], Any]:
        module, x, d = layer.make(torch.device("cuda"))
        out = torch.zeros(layer.samples, layer.proj_dim, device="cuda")
        return partial(
            sketch_kernel.launch_sketch, module, x, d, sketch, out, layer.timesteps, config
        )

    moved = layer.dtype.itemsize * layer.samples * layer.timesteps * positions * (channels + rows)
    return Case(
        f"sketch {layer.name}, B {layer.samples}, S {layer.timesteps}, K {layer.proj_dim}",
        partial(build_form, form, config, size=layer.size),
        programs=layer.samples * used,
        warps=config.num_warps,
        trips=(tiles / used, ceil_div(layer.reduction, config.block_t)),
        flops=2.0 * layer.samples * tiles * BM * BN * layer.reduction,
        bytes=float(moved + 8 * layer.samples * used * BM * BN),
        run=run,
    )


def gram_case(N: int, K: int, M: int) -> Case:
    """Φᵀ(ΦV), float32."""
    config = gram_kernel.DEFAULT_CONFIG
    block_n, block_k, block_m = (config[f"BLOCK_{axis}"] for axis in "NKM")
    rows = ceil_div(ceil_div(N, gram_kernel._MAX_PARTS), block_n) * block_n
    parts = ceil_div(N, rows)
    kernel, types, constexprs, options = gram_kernel.KERNELS["gram_product_float32"]

    def run() -> Callable[[], Any]:
        features, vectors = torch.randn(N, K, device="cuda"), torch.randn(K, M, device="cuda")
        return partial(gram_kernel.launch_gram_product, features, vectors, 0.1, config=config)

    return Case(
        f"gram_product N {N}, K {K}, M {M}",
        partial(
            compile_kernel,
            kernel,
            types,
            constexprs,
            divisible=DIVISIBLE | {"features_ptr", "vectors_ptr", "partials_ptr", "stride_fn"},
            **options,
        ),
        programs=parts * ceil_div(M, block_m),
        warps=options["num_warps"],
        trips=(rows / block_n, ceil_div(K, block_k)),
        flops=0.0,
        bytes=4.0 * N * K + 4.0 * K * M + 8.0 * parts * K * M,
        run=run,
    )


def make_cases(card: Card, *, smoke: bool, device_name: str = "") -> Iterator[Case]:
    """Every kernel at a size it is used at, with the configuration that a device launches."""
    yield product_case("rademacher", 128, 2**20, 4096, torch.bfloat16, card)
    if smoke:
        yield gram_case(5000, 32768, 32)
        return
    yield product_case("rademacher", 32, 2**20, 4096, torch.float32, card)
    yield product_case("normal", 128, 2**18, 4096, torch.float16, card)
    yield pack_case(128, 2**20)
    yield reduce_case(128, 4096, 8)
    for layer in SKETCHED:
        yield sketch_case(layer, card, device_name)
    yield gram_case(5000, 32768, 32)


def measure(run: Callable[[], Any], rounds: int = 20) -> float:
    """Median seconds of a launch on the GPU."""
    device = torch.device("cuda")
    flush = make_flush(device)
    run()
    return sorted(timed(run, device, flush) for _ in range(rounds))[rounds // 2]


def find_card(name: str) -> Card | None:
    """The card a device's name speaks of."""
    return next((card for card in CARDS.values() if card.name in name), None)


def main() -> int:
    """Print a line per case; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the rows, modelled.jsonl")
    parser.add_argument("--card", choices=CARDS, help="instead of this machine's, or an H200")
    parser.add_argument("--smoke", action="store_true", help="a few cases")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    here = find_card(torch.cuda.get_device_name()) if cuda else None
    card = CARDS[options.card] if options.card else here or CARDS["H200"]
    is_measured = here is not None and card is here
    sys.stdout.write(f"{card.name}: {NOTE}\n")
    failures = 0
    name = torch.cuda.get_device_name() if is_measured else ""
    for case in make_cases(card, smoke=options.smoke, device_name=name):
        row: dict[str, Any] = {"case": case.name, "card": card.name, "note": NOTE}
        try:
            parts = cost(case, card)
            limit = max(parts, key=lambda name: parts[name])
            row |= {"modelled_seconds": parts[limit], "limit": limit, "parts": parts}
            row["measured_seconds"] = measure(case.run()) if is_measured else None
        # one kernel that does not compile or run leaves the others
        except Exception as error:
            failures += 1
            sys.stdout.write(f"{case.name}: {type(error).__name__}: {error}\n")
            continue
        found = row["measured_seconds"]
        text = "not measured" if found is None else f"measured {1e3 * found:.3f} ms"
        modelled = f"modelled {1e3 * row['modelled_seconds']:.3f} ms by {limit}"
        sys.stdout.write(f"{case.name:44} {modelled}, {text}\n")
        sys.stdout.flush()
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            with (options.out / "modelled.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
