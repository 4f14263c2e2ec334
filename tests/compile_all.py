"""Compile the dense projection and the fused sketch for every target; report the code as JSON.

Not a test file: an interpreted kernel cannot be compiled, so `test_compile.py` runs this in a
process without TRITON_INTERPRET. No GPU is needed; ptxas, cuobjdump and nvdisasm come with Triton.
With a folder as argument, only the configurations in its files are compiled, each for its card;
with the word ``candidates``, what `benchmarks/tune.py` tries of the fused sketch (minutes); with
the word ``few``, of every kernel one form for one target, and what a flip costs there.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtrak_kernels import tuning
from dtrak_kernels.dense import config as dense_config
from dtrak_kernels.dense import triton as dense_kernel
from dtrak_kernels.ridge import gram_triton as gram_kernel
from dtrak_kernels.sjlt import config as sketch_config
from dtrak_kernels.sjlt import triton as sketch_kernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# the one that the fast lane of the tests looks at
FEW = "sm_90"

# targets by what is in a device's name
CARDS = {
    "A100": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "GH200": "sm_90",
    "B200": "sm_100",
    "MI300": "gfx942",
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


SKETCH = (
    "x_ptr:*{dtype} d_ptr:*{dtype} blocks_ptr:*i32 tiles_ptr:*i32 out_ptr:*fp32 "
    "scales_ptr:*bf16 scale:fp32 blocks:i32 "
    "rows_per_sample:i32 O:i32 C:i32 I:i32 H:i32 W:i32 KW:i32 K:i32 low:i64 high:i32 key_low:i64 "
    "key_high:i64 stride_h:i32 stride_w:i32 pad_h:i32 pad_w:i32 dilation_h:i32 dilation_w:i32 "
    "rows_per_group:i32 stride_xr:i32 stride_xc:i32 stride_xh:i32 stride_xw:i32 stride_dr:i32 "
    "stride_dc:i32 stride_dh:i32 stride_dw:i32 stride_ob:i32"
)
SKETCH_DIVISIBLE = {"x_ptr", "d_ptr", "out_ptr", "scales_ptr", "O", "C", "I", "K", "stride_ob"}
SKETCH_DIVISIBLE |= {"stride_xr", "stride_xh", "stride_xw", "stride_dr", "stride_dh", "stride_dw"}
CHANNELS_LAST = {"stride_xc": 1, "stride_dc": 1}
UNIT_STEPS = {"stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1, "rows_per_group": 1}
# a linear layer, or a 1 x 1 convolution: rows and positions are one axis
ONE_AXIS = {"HO": 1, "WO": 1, "H": 1, "W": 1, "KW": 1, "pad_h": 0, "pad_w": 0, "IS_PADDED": False}
ONE_AXIS |= {"stride_xh": 0, "stride_xw": 0, "stride_dh": 0, "stride_dw": 0}
THREE_CHANNELS = {"IS_ONE_TAP": False, "I": 3, "C": 27}

# a scale for every entry, as whitened gradients have
ENTRIES = {"HAS_SCALES": True}

# name: (dtype, tile, arguments and flags that differ from an ordinary 3 x 3 convolution)
SKETCHES = {
    "3x3": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS),
    "3x3, no flip": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS | {"IS_FLIPPED": False}),
    "3x3, scaled": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS | {"IS_SCALED": True}),
    "3x3, entries": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS | ENTRIES),
    "few channels, entries": (
        "bf16",
        (128, 32),
        CHANNELS_LAST | UNIT_STEPS | THREE_CHANNELS | ENTRIES,
    ),
    "linear, float32, entries": (
        "fp32",
        (128, 128),
        CHANNELS_LAST | UNIT_STEPS | ONE_AXIS | ENTRIES,
    ),
    "strided": ("fp16", (128, 64), CHANNELS_LAST),
    "few channels": ("bf16", (128, 32), CHANNELS_LAST | UNIT_STEPS | THREE_CHANNELS),
    "few positions": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS | {"HO": 2, "WO": 2}),
    "NCHW": ("fp16", (128, 128), UNIT_STEPS),
    "linear": ("bf16", (128, 128), CHANNELS_LAST | UNIT_STEPS | ONE_AXIS),
    "linear, float32": ("fp32", (128, 128), CHANNELS_LAST | UNIT_STEPS | ONE_AXIS),
    "smallest tile": ("bf16", (16, 16), CHANNELS_LAST | UNIT_STEPS),
    "groups, wide": (
        "fp16",
        (128, 128),
        {"IS_GROUPED": True, "IS_ONE_TAP": False, "IS_WIDE": True},
    ),
}
# the others differ in how much they unroll, which is looked at on two targets
SKETCHES_EVERYWHERE = {"3x3", "few channels", "linear, float32", "groups, wide"}


def compile_kernel(
    kernel,
    types,
    constexprs,
    target,
    *,
    ones=False,
    num_warps=4,
    num_stages=2,
    divisible=DIVISIBLE,
):
    """One kernel for one target; with ``ones``, every size and stride is the constant 1.

    Triton turns an argument that equals 1 into a constant, which lacks a tensor's methods.
    """
    signature = dict(item.split(":") for item in types.split())
    constants = dict(constexprs)
    if ones:
        kept = {"first", "low", "high", "key_low", "key_high"}
        constants |= {n: 1 for n, t in signature.items() if t[0] == "i" and n not in kept}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(kernel.arg_names)
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in divisible & set(names)
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


def resources(cubin):
    """Registers (REG) and bytes of stack (STACK) of a thread."""
    usage = disassembly("cuobjdump", "-res-usage", cubin=cubin)
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", usage)}


def registers(cubin):
    """Of a thread."""
    return resources(cubin)["REG"]


def report(built):
    """What the compiled code needs: shared and tensor memory, spills, and its instructions."""
    facts = {
        "shared": built.metadata.shared,
        "tensor_memory": getattr(built.metadata, "tmem_size", None) or 0,
    }
    if "cubin" in built.asm:
        cubin = built.asm["cubin"]
        used = resources(cubin)
        ptx = built.asm["ptx"]
        facts["stack"] = used["STACK"]
        facts["registers"] = used["REG"]
        facts["traps"] = len(re.findall(r"\btrap;", ptx))
        facts["matrix"] = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))
        facts["loop"] = longest_loop(disassembly("nvdisasm", "-c", cubin=cubin))
    else:
        code = built.asm["amdgcn"]
        facts["stack"] = int(re.search(r"\.private_segment_fixed_size: (\d+)", code)[1])
        facts["traps"] = len(re.findall(r"\bs_trap\b", code))
        facts["matrix"] = len(re.findall(r"\bv_mfma", code))
    return facts


def sketch_cases(arch):
    """The fused sketch, in the forms that layers of a U-Net take."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, (dtype, tile, changes) in SKETCHES.items():
        if name not in SKETCHES_EVERYWHERE and arch not in ("sm_80", "sm_90"):
            continue
        flags = {
            "HO": 16,
            "WO": 16,
            "IS_ONE_TAP": True,
            "IS_PADDED": True,
            "IS_GROUPED": False,
            "IS_WIDE": False,
            "IS_FLIPPED": True,
        } | changes
        config = sketch_config.default_config(
            TARGETS[arch].arch,
            tile,
            dtypes[dtype],
            16 if "few positions" in name else 4096,
            is_one_tap=flags["IS_ONE_TAP"],
            is_wide=flags["IS_WIDE"],
            is_channels_last="stride_xc" in flags,
        )
        for ones in (False, True) if name == "smallest tile" and arch == "sm_80" else (False,):
            yield {
                "kernel": "sketch",
                "form": f"{name}, every size 1" if ones else name,
                "dtype": dtype,
                "build": partial(build_sketch, dtype, tile, flags, config, ones=ones),
            }


def build_sketch(dtype, tile, flags, config, target, *, ones=False):
    """The fused sketch of one form under a configuration."""
    flags = {"IS_SCALED": False, "HAS_SCALES": False} | flags
    flags |= {} if flags["HAS_SCALES"] else {"scales_ptr": None}
    return compile_kernel(
        sketch_kernel._sketch_kernel,
        SKETCH.format(dtype=dtype),
        flags
        | {"IS_ROLLED": config.is_rolled, "INPUT_PRECISION": config.input_precision}
        | {"BM": tile[0], "BN": tile[1], "BLOCK_T": config.block_t},
        target,
        ones=ones,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=SKETCH_DIVISIBLE,
    )


def build_form(form, config, target, *, size=16):
    """The fused sketch of a layer of a form, as `sketch_config` finds configurations for it."""
    flags = {"HO": size, "WO": size, "IS_ONE_TAP": form.is_one_tap, "IS_PADDED": True}
    flags |= {"IS_GROUPED": form.is_grouped, "IS_WIDE": form.is_wide, "IS_FLIPPED": True}
    flags |= UNIT_STEPS | (CHANNELS_LAST if form.is_channels_last else {})
    flags |= ONE_AXIS if form.is_one_axis else {}
    flags |= {} if form.is_one_tap else THREE_CHANNELS
    dtype = "fp32" if form.dtype == torch.float32 else "bf16"
    return build_sketch(dtype, form.tile, flags, config, target)


def cases(arch):
    """Every kernel, in every form the default configuration of ``arch`` can launch."""
    for kind in ("rademacher", "normal"):
        config = dense_config.default_config(TARGETS[arch].arch, kind)
        widths = sorted({16, config.block_b})
        kernel = getattr(dense_kernel, f"_{kind}_partial_kernel")
        for width in widths:
            dtype = "bf16" if kind == "rademacher" and width == 16 else "fp16"
            yield {
                "kernel": kind,
                "build": partial(
                    compile_kernel,
                    kernel,
                    PRODUCT.format(dtype=dtype),
                    {"BLOCK_B": width, "BLOCK_K": config.block_k},
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
                dense_kernel._pack_kernel,
                PACK.format(dtype="fp32"),
                {"IS_SPLIT": True, "BLOCK_C": 1024},
                target,
                ones=ones,
            ),
        }
        yield {
            "kernel": "reduce",
            "build": lambda target, ones=ones: compile_kernel(
                dense_kernel._reduce_kernel,
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
                    getattr(dense_kernel, f"_{kind}_partial_kernel"),
                    PRODUCT.format(dtype="fp16"),
                    {"BLOCK_B": 16, "BLOCK_K": 16},
                    target,
                    ones=True,
                ),
            }


def build_tuned(operation, sizes, config, target):
    """The kernel of an operation under a configuration from a file."""
    if operation == "sketch":
        form = sketch_config.read_form(sizes["form"])
        return build_form(form, sketch_config.read_config(config, "sketch.json"), target)
    if operation == "gram_product":
        kernel, types, constexprs, options = gram_kernel.KERNELS["gram_product_float32"]
        config = gram_kernel.read_config(config, "gram_product.json")
        constexprs = {name: config[name] for name in constexprs}
        options = {name: config[name] for name in options}
        return compile_kernel(kernel, types, constexprs, target, **options)
    kind = operation.removeprefix("project_")
    fields = dense_config.read_config(config, f"{operation}.json")
    return compile_kernel(
        getattr(dense_kernel, f"_{kind}_partial_kernel"),
        PRODUCT.format(dtype="bf16" if kind == "rademacher" else "fp16"),
        {"BLOCK_B": fields.block_b, "BLOCK_K": fields.block_k},
        target,
        num_warps=fields.num_warps,
        num_stages=fields.num_stages,
    )


def tuned_cases(arch, folder):
    """Every configuration of a folder whose card is ``arch``, or is not known."""
    for file in sorted(folder.glob("*.json")):
        operation = file.stem
        if operation not in ("project_rademacher", "project_normal", "gram_product", "sketch"):
            raise SystemExit(f"{file.name}: no operation is called {operation!r}")
        for device, entries in json.loads(file.read_text()).items():
            of_card = {a for name, a in CARDS.items() if name in device} or set(TARGETS)
            if arch not in of_card:
                continue
            for entry in entries:
                config, sizes = entry["config"], entry["sizes"]
                is_dense = "project" in operation
                fields = asdict(dense_config.read_config(config, file.name)) if is_dense else {}
                yield {
                    "kernel": operation.removeprefix("project_"),
                    "tuned": device,
                    "sizes": sizes,
                    # what a sketch multiplies, for which tests ask
                    **({"dtype": sizes["form"]} if operation == "sketch" else {}),
                    "build": partial(build_tuned, operation, sizes, config),
                    **fields,
                }


def candidate_cases(arch):
    """Of each form and number of warps the candidates that need most of a card."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from sketch_layers import LAYERS, candidates

    longest = {}
    for layer in LAYERS:
        longest[layer.form] = max(layer.reduction, longest.get(layer.form, 0))
    for form, reduction in longest.items():
        tried = [c for c, why in candidates(form, TARGETS[arch].arch, reduction) if not why]
        largest = {}
        for config in sorted(tried, key=lambda c: (c.block_t, c.num_stages)):
            largest[config.num_warps] = config
        for config in largest.values():
            yield {
                "kernel": "sketch",
                "form": str(form),
                "dtype": "fp32" if form.dtype == torch.float32 else "bf16",
                "config": asdict(config),
                "build": partial(build_form, form, config),
            }


def few(cases):
    """Each kernel once, the sketch with and without flips, and what is tuned."""
    seen, forms = set(), ("3x3", "3x3, no flip")
    for case in cases:
        is_another = case["form"] in forms if "form" in case else case["kernel"] not in seen
        if "tuned" in case or is_another:
            seen.add(case["kernel"])
            yield case


def main(arguments):
    results = []
    if arguments == ["candidates"]:
        for arch, target in TARGETS.items():
            for case in candidate_cases(arch):
                build = case.pop("build")
                results.append(case | {"arch": arch} | report(build(target)))
        json.dump(results, sys.stdout, indent=1)
        return
    is_few = arguments == ["few"]
    folder = Path(arguments[0]) if arguments and not is_few else None
    for arch, target in {FEW: TARGETS[FEW]}.items() if is_few else TARGETS.items():
        shipped = tuned_cases(arch, folder or tuning.CONFIGS)
        found = shipped if folder else (*cases(arch), *sketch_cases(arch), *shipped)
        for case in few(found) if is_few else found:
            build = case.pop("build")
            results.append(case | {"arch": arch} | report(build(target)))
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
