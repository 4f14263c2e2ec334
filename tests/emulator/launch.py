"""Stand-ins for Triton kernels: a launch compiles for a card, as Triton would, and emulates it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from .decode import Code, decode
from .machine import Machine
from .memory import GlobalMemory
from .ptx import parse
from .traffic import Traffic

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
}


@dataclass(frozen=True)
class Compiled:
    """What Triton makes of a kernel, without the last step to a card's own code.

    Attributes:
        ptx: the text.
        shared: bytes of shared memory of a block.
    """

    ptx: str
    shared: int


def compile_ptx(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    """PTX of a kernel, kept in Triton's cache folder."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options) | source.parse_options())
    key = f"emulated {triton.__version__} {source.hash()} {backend.hash()} {parsed.hash()}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    if stored := cache.get_file("emulated.json"):
        return Compiled(**json.loads(Path(stored).read_text()))
    stages: dict[str, Callable[[Any, dict], Any]] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module: Any = source.make_ir(
        target,
        parsed,
        backend.get_codegen_implementation(parsed),
        backend.get_module_map(),
        context,
    )
    metadata: dict[str, Any] = {"target": target, **parsed.__dict__}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            break
    built = Compiled(module, metadata["shared"])
    cache.put(json.dumps(built.__dict__), "emulated.json", binary=False)
    return built


@lru_cache(maxsize=64)
def decoded(ptx: str) -> Code:
    """Steps of what was compiled."""
    return decode(parse(ptx))


@dataclass
class Variant:
    """A compiled form of a kernel, and what its launches executed.

    Attributes:
        runs: times blocks that each run of instructions, (first, last), was executed.
        traffic: what was moved, where that is counted.
    """

    compiled: Compiled
    code: Code
    num_warps: int
    launches: int = 0
    blocks: int = 0
    runs: Counter[tuple[int, int]] = field(default_factory=Counter)
    traffic: Traffic = field(default_factory=Traffic)

    def executed(self) -> Counter[str]:
        """Instructions by opcode, each counted once per block."""
        counts: Counter[str] = Counter()
        for (first, last), times in self.runs.items():
            for instruction in self.code.program.instructions[first : last + 1]:
                counts[instruction.opcode] += times
        return counts


class Emulated:
    """Has a kernel's ``[grid](...)``.

    Args:
        kernel: of Triton.
        arch: CUDA compute capability times ten.
        edit: changes the PTX before it is run, as tests of the emulator do.
        counts: count what is moved, which takes time.
    """

    def __init__(
        self,
        kernel: Any,
        arch: int,
        edit: Callable[[str], str] | None = None,
        *,
        counts: bool = False,
    ) -> None:
        self.kernel, self.target, self.edit = kernel, GPUTarget("cuda", arch, 32), edit
        self.counts = counts
        self.variants: dict[object, Variant] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launch(grid, *arguments, **options)

    def launch(
        self,
        grid: Any,
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **named: Any,
    ) -> None:
        """Compile for these arguments, if that is new, and run."""
        bound = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        signature, constants, attributes, values = self._specialize(bound)
        key = (str(signature), str(constants), str(attributes), num_warps, num_stages)
        if key not in self.variants:
            source = ASTSource(self.kernel, signature, constants, attributes)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = compile_ptx(source, self.target, options)
            code = decoded(compiled.ptx)
            if self.edit:
                code = decode(parse(self.edit(compiled.ptx)), like=code)
            self.variants[key] = Variant(compiled, code, num_warps)
        variant = self.variants[key]
        grid = grid(bound) if callable(grid) else grid
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        if math.prod(sizes) == 0:
            return
        x, y, z = (*sizes, 1, 1)[:3]
        tensors = [a for a in bound.values() if isinstance(a, torch.Tensor)]
        memory = GlobalMemory(storages(tensors), variant.code.global_grain)
        traffic = variant.traffic if self.counts else None
        machine = Machine(variant.code, memory, values, variant.compiled.shared, (x, y, z), traffic)
        variant.runs.update(machine.run())
        variant.launches += 1
        variant.blocks += x * y * z

    def _specialize(
        self, bound: dict[str, Any]
    ) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list], list[int]]:
        """Types, constants and known multiples of 16, as Triton tells them, and what is passed."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list] = {}
        values: list[int] = []
        for place, parameter in enumerate(self.kernel.params):
            name = parameter.name
            value = bound.get(name, parameter.default if parameter.has_default else None)
            if parameter.is_constexpr or value is None:
                constants[name], signature[name] = value, "constexpr"
                continue
            if isinstance(value, torch.Tensor):
                signature[name], number = POINTERS[value.dtype], value.data_ptr()
            elif isinstance(value, int):
                number = int(value)
                if number == 1 and not parameter.do_not_specialize:
                    constants[name], signature[name] = 1, "constexpr"
                    continue
                is_narrow = -(2**31) <= number < 2**31
                signature[name] = "i32" if is_narrow else "i64" if number < 2**63 else "u64"
            elif isinstance(value, float):
                signature[name] = "fp32"
                values.append(int(np.float32(value).view(np.uint32)))
                continue
            else:
                raise TypeError(f"{name}: no way is known to pass {value!r} to a kernel")
            values.append(number)
            kept = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            if number % 16 == 0 and not kept:
                attributes[(place,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes, values


def storages(tensors: list[torch.Tensor]) -> dict[int, np.ndarray]:
    """Bytes of the memory of tensors by address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            found[storage.data_ptr()] = whole.numpy()
    return found


@contextmanager
def emulating(
    module: ModuleType, *names: str, arch: int, edit: Callable[[str], str] | None = None
) -> Iterator[dict[str, Emulated]]:
    """Kernels of a module are emulated inside."""
    kernels = {name: getattr(module, name) for name in names}
    stand_ins = {name: Emulated(kernel, arch, edit) for name, kernel in kernels.items()}
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    try:
        yield stand_ins
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
