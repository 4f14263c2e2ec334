"""Compile every dense projection kernel for every target, and report what came out as JSON.

Not a test file: an interpreted kernel cannot be compiled, so `test_compile.py` runs this in a
process without TRITON_INTERPRET. No GPU is needed; ptxas, cuobjdump and nvdisasm come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtrak_kernels import projection

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

PRODUCT = (
    "values_ptr:*{dtype} partial_ptr:*fp32 rows:i32 blocks:i32 K:i32 first:i64 "
    "key_low:i64 key_high:i64 stride_vb:i64 stride_ps:i64"
)
PACK = "grads_ptr:*{dtype} scale_ptr:*fp32 values_ptr:*fp16 B:i32 C:i64 start:i64 "
PACK += "stride_gb:i64 stride_vb:i64"
REDUCE = "partial_ptr:*fp32 factor_ptr:*fp32 out_ptr:*fp32 B:i32 K:i32 splits:i32 "
REDUCE += "stride_ps:i64 stride_ob:i64"

# arguments that are multiples of 16 on the fast path: pointers, and row strides of packed values
DIVISIBLE = {"values_ptr", "partial_ptr", "grads_ptr", "out_ptr", "stride_vb", "stride_ps", "K"}


def compile_kernel(kernel, types, constexprs, target, *, ones=False, num_warps=4, num_stages=2):
    """One kernel for one target; with ``ones``, every size and stride is the constant 1.

    Triton turns an argument that equals 1 into a constant, which lacks a tensor's methods.
    """
    signature = dict(item.split(":") for item in types.split())
    constants = dict(constexprs)
    if ones:
        kept = {"first", "key_low", "key_high"}
        constants |= {n: 1 for n, t in signature.items() if t[0] == "i" and n not in kept}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(kernel.arg_names)
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in DIVISIBLE & set(names)
        if name not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=target, options=options)


def disassembly(tool, *flags, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_loop(sass):
    """Instructions in the longest loop: between a backward branch and its target."""
    count, labels, longest = 0, {}, 0
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:
                longest = max(longest, count + 1 - labels[branch[1]])
            count += 1
    return longest


def report(built):
    """What the compiled code needs: shared and tensor memory, spills, and its instructions."""
    facts = {
        "shared": built.metadata.shared,
        "tensor_memory": getattr(built.metadata, "tmem_size", None) or 0,
    }
    if "cubin" in built.asm:
        cubin = built.asm["cubin"]
        usage = disassembly("cuobjdump", "-res-usage", cubin=cubin)
        ptx = built.asm["ptx"]
        facts["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        facts["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        facts["traps"] = len(re.findall(r"\btrap;", ptx))
        facts["matrix"] = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))
        facts["loop"] = longest_loop(disassembly("nvdisasm", "-c", cubin=cubin))
    else:
        code = built.asm["amdgcn"]
        facts["stack"] = int(re.search(r"\.private_segment_fixed_size: (\d+)", code)[1])
        facts["traps"] = len(re.findall(r"\bs_trap\b", code))
        facts["matrix"] = len(re.findall(r"\bv_mfma", code))
    return facts


def cases(arch):
    """Every kernel, in every form the default configuration of ``arch`` can launch."""
    config = projection.default_config(TARGETS[arch].arch)
    widths = sorted({16, config.block_b})
    for kind in ("rademacher", "normal"):
        kernel = getattr(projection, f"_{kind}_partial_kernel")
        for width in widths:
            dtype = "bf16" if kind == "rademacher" and width == 16 else "fp16"
            yield {
                "kernel": kind,
                "build": lambda target, kernel=kernel, dtype=dtype, width=width: compile_kernel(
                    kernel,
                    PRODUCT.format(dtype=dtype),
                    {"BLOCK_B": width, "BLOCK_K": config.block_k},
                    target,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                ),
                "block_b": width,
                "block_k": config.block_k,
                "num_warps": config.num_warps,
            }
    for ones in (False, True):
        yield {
            "kernel": "pack",
            "build": lambda target, ones=ones: compile_kernel(
                projection._pack_kernel,
                PACK.format(dtype="fp32"),
                {"IS_SPLIT": True, "BLOCK_C": 1024},
                target,
                ones=ones,
            ),
        }
        yield {
            "kernel": "reduce",
            "build": lambda target, ones=ones: compile_kernel(
                projection._reduce_kernel,
                REDUCE,
                {"IS_SPLIT": True, "BLOCK_K": 1024},
                target,
                ones=ones,
            ),
        }
    if arch == "sm_80":
        for kind in ("rademacher", "normal"):
            yield {
                "kernel": f"{kind}, every size 1",
                "build": lambda target, kind=kind: compile_kernel(
                    getattr(projection, f"_{kind}_partial_kernel"),
                    PRODUCT.format(dtype="fp16"),
                    {"BLOCK_B": 16, "BLOCK_K": 16},
                    target,
                    ones=True,
                ),
            }


def main():
    results = []
    for arch, target in TARGETS.items():
        for case in cases(arch):
            build = case.pop("build")
            results.append(case | {"arch": arch} | report(build(target)))
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
