"""What the fused sketch should cost: stage by stage of CIFAR-2, layer by layer of four models.

    python benchmarks/predicted.py [--record] [--smoke] [--docs | --check]

Every layer's launch is made on tensors without memory, so its arguments are those of a real one.
Three sources are put together: ptxas' code, whose instructions go to the pipes that execute them
(`modelled`) and which says what registers and shared memory a program takes; the emulator, which
runs that launch on a tile or two and counts wavefronts of shared memory and sectors of global
memory; and the card's nominal rates. The time is that of the busiest resource: **a model, never a
measurement**, and no kernel reaches it.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch

# an interpreted kernel cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)

from modelled import CARDS, Card, cost, pipe_seconds, product_case, read_loops
from pages import ROOT, Table, newest, record, run
from torch import Tensor, nn
from workloads import LayerShape, add_lora, recorded_layers, stable_diffusion_unet

sys.path.insert(0, str(ROOT / "tests"))

from compile_all import disassembly, registers
from emulator.launch import Emulated
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_triton

from dtrak.pages import tables
from dtrak_kernels.dense import config as dense_config
from dtrak_kernels.sjlt import config as sketch_config
from dtrak_kernels.sjlt import triton as sketch_kernel
from dtrak_kernels.sjlt.torch import ParameterSketch

RESULTS = ROOT / "benchmarks" / "results" / "predicted.jsonl"
RANK, WIDTH, S = 16, 32768, 10
# of a low-rank whitening
DIRECTIONS = 64
# cycles from a tile's first load to its first product, in which a program does nothing else
FILL = 600
# of a multiprocessor: registers, threads, bytes of shared memory
REGISTERS, THREADS, SHARED = 65536, 2048, {80: 164 * 1024, 90: 228 * 1024}
# convolutions that stand for the others
FIRST_LAYERS = ("conv3x3 128→128 @32x32", "conv3x3 256→256 @16x16", "conv3x3 256→256 @4x4")
# CIFAR-2: training images, parameters
N, P = 5000, 38_306_691


def cifar() -> list[LayerShape]:
    """Every layer of the CIFAR U-Net."""
    return recorded_layers()


def traced(model: nn.Module, call: Callable[[], Any]) -> list[LayerShape]:
    """The distinct linear layers whose weight is asked for, in the order a forward meets them."""
    found: Counter[LayerShape] = Counter()

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Any) -> None:
        options = (("in_features", module.in_features), ("out_features", module.out_features))
        found[LayerShape("linear", (*options, ("bias", False)), tuple(args[0].shape[1:]))] += 1

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return [replace(shape, count=count) for shape, count in found.items()]


def stable_diffusion() -> list[LayerShape]:
    """A LoRA of Stable Diffusion 1.x at 512 pixels."""
    with torch.device("meta"):
        model = stable_diffusion_unet()
        add_lora(model, RANK)
        x, text = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768)
        return traced(model, lambda: model(x, torch.zeros(1), text))


def planned(name: str) -> list[LayerShape]:
    """A LoRA of a model of `planned_memory` at 1024 pixels."""
    import planned_memory
    from peft import LoraConfig

    with torch.device("meta"):
        model, outputs = planned_memory.MODELS[name](1024)
        model.to(torch.bfloat16).requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, target_modules=planned_memory.TARGETS))
        return traced(model, outputs(1))


MODELS: dict[str, tuple[Callable[[], list[LayerShape]], int]] = {
    # layers, and samples of a batch
    "CIFAR U-Net": (cifar, 64),
    "SD 1.5 LoRA, 512 px": (stable_diffusion, 16),
    "SDXL LoRA, 1024 px": (lambda: planned("SDXL"), 4),
    "FLUX.1 LoRA, 1024 px": (lambda: planned("FLUX.1-dev"), 2),
}


@dataclass(frozen=True)
class Launch:
    """One launch of the fused sketch that did not take place.

    Attributes:
        programs: of the grid.
        arguments: of the kernel and its options; tensors have no memory.
        key: what decides the compiled code.
    """

    programs: int
    arguments: dict[str, Any]
    key: str

    @property
    def positions(self) -> int:
        """Rows of a sample times positions."""
        of = self.arguments
        return of["rows_per_sample"] * of["HO"] * of["WO"]

    @property
    def steps(self) -> int:
        """Of the reduction."""
        return -(-self.positions // self.arguments["BLOCK_T"])


def launches_of(
    shape: LayerShape, samples: int, arch: int, *, is_last: bool = True, is_thin: bool = False
) -> list[Launch]:
    """What a batch launches for a layer, in bfloat16; unless ``is_last``, on channels first.

    ``is_thin``: the second launch of a whitened convolution.
    """
    found: list[Launch] = []
    stand_in = Emulated(sketch_kernel._sketch_kernel, arch)

    def note(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        of_kernel = {k: v for k, v in arguments.items() if k not in ("num_warps", "num_stages")}
        *types, _ = stand_in._specialize(of_kernel)
        options = arguments["num_warps"], arguments["num_stages"]
        found.append(Launch(grid[0], arguments, f"{types} {options}"))

    def config_on(device: Any, form: sketch_config.Form, reduction: int) -> Any:
        return sketch_config.find_config(form, arch, reduction)

    with torch.device("meta"):
        module = shape.make().bfloat16()
        x = torch.empty(samples * S, *shape.x, dtype=torch.bfloat16)
        delta = torch.empty_like(module(x))
        if shape.kind == "conv" and is_last:
            x, delta = (a.to(memory_format=torch.channels_last) for a in (x, delta))
        out = torch.empty(samples, WIDTH)
    sketch = ParameterSketch(tuple(module.weight.shape), 0, WIDTH, 1)
    rows = S
    if is_thin:
        # what `low_rank_part` makes of a convolution: one input for all samples
        module = nn.Linear(1, 1, bias=False, device="meta")
        outputs, inputs = matrix_of(shape)
        like = {"dtype": torch.bfloat16, "device": "meta"}
        x = torch.empty(2 * DIRECTIONS, inputs, **like).expand(samples, -1, -1)
        delta = torch.empty(samples, 2 * DIRECTIONS, outputs, **like)
        rows = 1
    with (
        mock.patch.object(sketch_kernel, "_channels_last", lambda images: images),
        mock.patch.object(sketch_kernel, "launch", note),
        mock.patch.object(sketch_kernel, "config_on", config_on),
    ):
        sketch_kernel.launch_sketch(module, x, delta, sketch, out, rows)
    return found


@dataclass(frozen=True)
class Program:
    """What ptxas made of a variant.

    Attributes:
        loops: its instructions.
        registers: of a thread.
        shared: bytes of a program.
    """

    loops: Any
    registers: int
    shared: int

    def resident(self, arch: int, warps: int) -> int:
        """Programs that a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        by_shared = SHARED[arch] // (self.shared + 1024)
        return max(1, min(by_registers, by_shared, THREADS // (32 * warps), 32))


class Compiler:
    """Programs by what decides them, and what the emulator counts of them."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self._programs: dict[str, Program] = {}
        self._counts: dict[Any, Counter[str]] = {}

    def program(self, launch: Launch) -> Program:
        """Compiled for the card."""
        if launch.key not in self._programs:
            of = dict(launch.arguments)
            options = {name: of.pop(name) for name in ("num_warps", "num_stages")}
            kernel = sketch_kernel._sketch_kernel
            signature, constants, attributes, _ = Emulated(kernel, self.arch)._specialize(of)
            source = ASTSource(kernel, signature, constants, attributes)
            built = compile_triton(source, GPUTarget("cuda", self.arch, 32), options)
            cubin = built.asm["cubin"]
            loops = read_loops(disassembly("nvdisasm", "-c", cubin=cubin))
            self._programs[launch.key] = Program(loops, registers(cubin), built.metadata.shared)
        return self._programs[launch.key]

    def counts(self, launch: Launch, tiles: float) -> Counter[str]:
        """Wavefronts and bytes of one program with so many tiles, by the emulator.

        Both grow evenly with tiles and with steps: a tile or two and few steps say it all.
        """
        steps = launch.steps
        # at least two steps more than the pipeline is deep
        few = min(steps, self._steps(launch, 4))
        many = min(steps, self._steps(launch, few + 2))
        first, second = self._run(launch, 1, few), self._run(launch, 2, few)
        longer = self._run(launch, 1, many)
        found: Counter[str] = Counter()
        for name in first:
            per_step = (longer[name] - first[name]) / max(1, many - few)
            per_tile = second[name] - first[name] + per_step * (steps - few)
            found[name] = round(2 * first[name] - second[name] + tiles * per_tile)
        return found

    def _steps(self, launch: Launch, least: int) -> int:
        """Steps of the fewest rows that have ``least``."""
        of = launch.arguments
        places = of["HO"] * of["WO"]
        rows = -(-least * of["BLOCK_T"] // places)
        return -(-rows * places // of["BLOCK_T"])

    def _run(self, launch: Launch, tiles: int, steps: int) -> Counter[str]:
        of = dict(launch.arguments)
        places = of["HO"] * of["WO"]
        rows = min(of["rows_per_sample"], max(1, steps * of["BLOCK_T"] // places))
        key = launch.key, tiles, rows
        if key in self._counts:
            return self._counts[key]

        def memory(name: str, sizes: tuple[int, ...]) -> Tensor:
            strides = (of[f"stride_{name}{axis}"] for axis in "rchw")
            last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            return torch.zeros(last + 1, dtype=of["x_ptr"].dtype)

        channels = of["C"] if places == 1 else of["x_ptr"].shape[1]
        of |= {
            "x_ptr": memory("x", (rows, channels, of["H"], of["W"])),
            "d_ptr": memory("d", (rows, of["O"], of["HO"], of["WO"])),
            "out_ptr": torch.zeros(1, of["K"]),
            "blocks_ptr": torch.tensor([[0, 0, tiles]], dtype=torch.int32),
            # neighbours in a row, or one below the other
            "tiles_ptr": torch.tensor([[0, 5, 9], [1, 3, 17]], dtype=torch.int32),
            "blocks": 1,
            "rows_per_sample": rows,
        }
        stand_in = Emulated(sketch_kernel._sketch_kernel, self.arch, counts=True)
        stand_in[(1,)](**of)
        (variant,) = stand_in.variants.values()
        found = Counter(
            shared=sum(access.units for access in variant.traffic.shared.values()),
            conflicts=sum(a.units - a.least for a in variant.traffic.shared.values()),
            l2=variant.traffic.l2_bytes,
        )
        for (first, last), times in variant.runs.items():
            for instruction in variant.code.program.instructions[first : last + 1]:
                if instruction.parts[:2] == ["wgmma", "mma_async"]:
                    found["shared"] += times * operand_wavefronts(instruction, of["num_warps"])
        self._counts[key] = found
        return found


def operand_wavefronts(instruction: Any, warps: int) -> int:
    """128 bytes at a time that the groups of four warps read of an asynchronous product."""
    columns = int(instruction.parts[4].split("n")[1].split("k")[0])
    rows = 0 if instruction.operands[1].startswith("{") else 64
    return warps // 4 * (rows + columns) * 32 // 128


def matrix_of(shape: LayerShape) -> tuple[int, int]:
    """Rows and columns of a layer's weight."""
    of = dict(shape.options)
    if shape.kind == "linear":
        return of["out_features"], of["in_features"]
    return of["out_channels"], of["in_channels"] // of["groups"] * shape_taps(shape)


def whitened(shape: LayerShape, samples: int, card: Card, compiler: Compiler) -> Counter[str]:
    """What `lowrank` adds to a layer's sketch: seconds of each step, one after the other.

    Products that torch makes take the time of their work, in float32 but for the r filters, or of
    moving what they read and write once, whichever is longer.
    """
    (outputs, inputs), taps = matrix_of(shape), shape_taps(shape)
    rows, float32 = samples * S, card.processors * card.fma * 2 * card.clock
    with torch.device("meta"):
        positions = rows * shape.make()(torch.empty(1, *shape.x)).numel() // outputs
    values = positions * inputs // taps
    entries = samples * outputs * inputs

    def product(work: float, moved: float, rate: float = float32) -> float:
        return max(work / rate, moved / card.memory)

    if taps > 1:
        # r filters, their product with the output gradients, the second launch
        thin = positions * DIRECTIONS
        seconds = Counter(
            directions=product(2 * thin * inputs, 2 * (values + thin), card.matrix),
            product=product(2 * thin * outputs, 4 * (positions * outputs + thin)),
        )
        second = predict(shape, samples, card, compiler, is_thin=True)
        return seconds + Counter(launch=second["seconds"])
    root = 4 * DIRECTIONS
    on_input = product(root * values, 4 * 4 * values)
    # formed by 16-bit products, whitened, and scattered once
    formed = 2 * positions * outputs * inputs / card.matrix
    on_slices = formed + product(root * entries, 6 * 4 * entries)
    is_formed = root * entries + 2 * positions * outputs * inputs < root * values
    return Counter(slices=on_slices) if is_formed else Counter(input=on_input)


def predict(
    shape: LayerShape,
    samples: int,
    card: Card,
    compiler: Compiler,
    *,
    is_last: bool = True,
    is_thin: bool = False,
) -> dict[str, Any]:
    """Seconds that each resource is busy with a batch of one layer, and the least there can be."""
    seconds: Counter[str] = Counter()
    facts: dict[str, Any] = {"variants": [], "launches": 0}
    matrix = moved = 0.0
    # K is a multiple of every tile: no window reaches into another one
    for launch in launches_of(shape, samples, card.arch, is_last=is_last, is_thin=is_thin):
        of, program = launch.arguments, compiler.program(launch)
        blocks, warps = of["blocks"], of["num_warps"]
        tiles = of["tiles_ptr"].shape[0] / blocks
        counts = compiler.counts(launch, tiles)
        fullest = -(-launch.programs // card.processors)
        executed = program.loops.total((tiles, launch.steps))
        seconds.update(pipe_seconds(executed, warps * fullest, card))
        work = 2.0 * launch.programs * tiles * of["BM"] * of["BN"] * launch.positions
        bytes_each = of["x_ptr"].element_size()
        per_position = of["O"] + of["C"] // max(1, 1 if is_thin else shape_taps(shape))
        moved += bytes_each * samples * launch.positions * per_position
        moved += 8.0 * launch.programs * of["BM"] * of["BN"]
        matrix += work
        resident = program.resident(card.arch, warps)
        rounds = -(-fullest // resident)
        seconds.update(
            {
                "matrix": work * fullest * card.processors / launch.programs / card.matrix,
                "shared": counts["shared"] * fullest / card.clock,
                "l2": counts["l2"] * launch.programs / card.l2,
                "latency": rounds * tiles * FILL / card.clock,
            }
        )
        facts["variants"].append(launch.key)
        facts["launches"] += 1
        facts |= {"registers": program.registers, "shared_bytes": program.shared}
        facts |= {"resident": resident, "programs": launch.programs}
        facts["conflicts"] = counts["conflicts"]
        inputs = math.prod(shape.x) * samples * S
        facts["outputs_per_input"] = of["O"] * launch.positions * samples / inputs
    seconds["memory"] = moved / card.memory
    limit = max(seconds, key=lambda name: seconds[name])
    return facts | {
        "seconds": seconds[limit],
        "limit": limit,
        "parts": dict(seconds),
        "ideal": max(matrix / card.matrix, seconds["memory"]),
        "flop": matrix,
    }


def shape_taps(shape: LayerShape) -> int:
    """Of the kernel of a convolution."""
    return math.prod(dict(shape.options).get("kernel_size", (1,)))


@cache
def compiler_of(arch: int) -> Compiler:
    """The one of an architecture, which keeps what it compiled."""
    return Compiler(arch)


def predict_model(name: str, card: Card, *, smoke: bool = False) -> dict[str, Any]:
    """A row: the model's layers and their sum, for one batch."""
    make, samples = MODELS[name]
    shapes = make()[:2] if smoke else make()
    layers = []
    for shape in shapes:
        compiler = compiler_of(card.arch)
        row = predict(shape, samples, card, compiler)
        row["whitening"] = dict(whitened(shape, samples, card, compiler))
        layers.append({"layer": shape.name, "count": shape.count} | row)
        print(
            f"  {shape.name:34} x {shape.count:3} {1e6 * row['seconds']:9.1f} us by {row['limit']}",
            flush=True,
        )
    variants = {key for layer in layers for key in layer.pop("variants")}
    total = lambda what: sum(layer["count"] * layer[what] for layer in layers)
    return {
        "model": name,
        "card": card.name,
        "samples": samples,
        "variants": len(variants),
        "launches": total("launches"),
        "seconds": total("seconds"),
        "ideal": total("ideal"),
        "whitening": sum(n["count"] * sum(n["whitening"].values()) for n in layers),
        "layers": layers,
    }


def dense_parts(kind: str, card: Card) -> dict[str, float]:
    """All of CIFAR-2's gradients in bfloat16 (float16 for normals) to K features, by resource."""
    batch, columns = 128, 2**18
    dtype = torch.bfloat16 if kind == "rademacher" else torch.float16
    parts = cost(product_case(kind, batch, columns, WIDTH, dtype, card), card)
    return {name: seconds * N / batch * P / columns for name, seconds in parts.items()}


def before_and_after(card: Card) -> list[dict[str, Any]]:
    """What the model found worst, as it was and as it is."""
    compiler, found = compiler_of(card.arch), []
    for shape in cifar():
        if shape.name in FIRST_LAYERS:
            after = predict(shape, 64, card, compiler)
            before = predict(shape, 64, card, compiler, is_last=False)
            # both images are read and written once
            sizes = math.prod(shape.x) + math.prod(shape.x) * after["outputs_per_input"]
            copies = 2 * 2 * 64 * S * sizes / card.memory
            found.append(
                {
                    "what": f"{shape.name}, 64 images that come channels first",
                    "before": before["seconds"],
                    "after": after["seconds"] + copies,
                }
            )
    sums = [
        sum(s.count * predict(s, batch, card, compiler)["seconds"] for s in cifar()) * N / batch
        for batch in (16, 64)
    ]
    what = "all sketches of CIFAR-2: batches of 16, of 64"
    found.append({"what": what, "before": sums[0], "after": sums[1]})
    if card.arch == 90:
        after, three = dense_parts("normal", card), dense_config.DenseConfig(128, num_stages=3)
        with mock.patch.object(dense_config, "default_config", return_value=three):
            before = dense_parts("normal", card)
        # ptxas lets each product wait for the one before: nothing else is done meanwhile
        serialized = before["issue"] + before["matrix"]
        what = "dense projection, normal: products serialized, or not"
        found.append({"what": what, "before": serialized, "after": max(after.values())})
    return [row | {"card": card.name} for row in found]


def measure(wanted: bool, smoke: bool) -> None:
    """Predict every model on the two kinds of cards."""
    cards = [CARDS["A100"]] if smoke else [CARDS["A100"], CARDS["H200"]]
    rows, stages, changes = [], {}, []
    for card in cards:
        for name in list(MODELS)[:1] if smoke else MODELS:
            print(f"{card.name}, {name}: a model", flush=True)
            rows.append(predict_model(name, card, smoke=smoke))
        cifar_row = next(row for row in rows if row["card"] == card.name)
        batches = N / cifar_row["samples"]
        stages[card.name] = {"weight gradients and sjlt": cifar_row["seconds"] * batches}
        if not smoke:
            for kind in ("rademacher", "normal"):
                seconds = max(dense_parts(kind, card).values())
                stages[card.name][f"dense projection, {kind}"] = seconds
            changes += before_and_after(card)
        # a forward, and a backward to the layers' inputs, at the nominal rate
        work = 2 * sum(layer["count"] * layer["flop"] for layer in cifar_row["layers"])
        stages[card.name]["forward and data gradient, at best"] = work / card.matrix * batches
        stages[card.name]["`lowrank` whitening adds"] = cifar_row["whitening"] * batches
    if wanted:
        record(RESULTS, {"rows": rows, "stages": stages, "changes": changes})


def make_table() -> list[str]:
    """The page's tables, from the last row of results."""
    row = newest(RESULTS)
    cards = list(row["stages"])
    head = f"stage of CIFAR-2 (N = {N:,}, S = {S}, K = {WIDTH:,}), modelled"
    stages = [
        (stage, *(f"{row['stages'][card][stage]:.2f} s" for card in cards))
        for stage in row["stages"][cards[0]]
    ]
    columns = ["one batch, modelled", "card", "samples", "launches", "variants", "sketches"]
    columns.append("at best")
    kinds = ["model", "card", "samples", "launches", "variants"]
    times = ["seconds", "ideal"]
    if "whitening" in row["rows"][0]:
        columns.append("`lowrank` adds")
        times.append("whitening")
    batches = [
        [*(found[name] for name in kinds), *(f"{1e3 * found[name]:.2f} ms" for name in times)]
        for found in row["rows"]
    ]
    changes = [
        (change["what"], change["card"], _duration(change["before"]), _duration(change["after"]))
        for change in row["changes"]
    ]
    changed = ("changed because of it, modelled", "card", "before", "after")
    lines = [
        *tables.Table((head, *cards), stages).markdown(),
        "",
        *tables.Table(columns, batches, words=("card",)).markdown(),
        "",
        *tables.Table(changed, changes, words=("card",)).markdown(),
    ]
    of_layers = (
        "layer", "times", "modelled", "at best", "limited by", "programs", "registers", "resident",
    )  # fmt: skip
    for card in cards:
        layers = [layer_cells(*found) for found in worst(row["rows"], card)]
        lines += ["", f"Layers that lose most, {card}:", ""]
        lines += tables.Table(of_layers, layers, words=("limited by",)).markdown()
    lines += [
        "",
        f"**Modelled, not measured**, by `python benchmarks/predicted.py`: bfloat16, LoRA of rank "
        f"{RANK}, S = {S}, K = {WIDTH:,}. torch {row['torch']}, {row['utc'][:10]}.",
    ]
    return lines


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 0.01 else f"{seconds:.2f} s"


def worst(rows: list[dict[str, Any]], card: str) -> list[tuple[str, dict[str, Any]]]:
    """Three layers of each model with the longest time above the best one."""
    found = []
    for row in rows:
        if row["card"] == card:
            lost = lambda layer: layer["count"] * (layer["seconds"] - layer["ideal"])
            layers = sorted(row["layers"], key=lost, reverse=True)
            found += [(row["model"].partition(",")[0], layer) for layer in layers[:3]]
    return found


def layer_cells(model: str, layer: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the table of layers."""
    return (
        f"{model}, {layer['layer']}",
        layer["count"],
        f"{1e6 * layer['seconds']:.0f} µs",
        f"{1e6 * layer['ideal']:.0f} µs",
        *(layer[name] for name in ("limit", "programs", "registers", "resident")),
    )


TABLE = Table(ROOT / "docs" / "predicted.md", "predicted", make_table)


if __name__ == "__main__":
    run(TABLE, __doc__, measure)
