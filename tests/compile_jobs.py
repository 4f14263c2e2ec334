"""All that tests have compiled, in one process, whose results lie in the folder it is given.

Not a test file: what compiles must not be interpreted. With the word ``few``, see `compile_all.py`.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

import compile_all
import triton
from triton.compiler import ASTSource

from dtrak_kernels.ridge.gram_triton import KERNELS

THIN = "one axis, channels last, 16 bits, tile 128x16"
SMALL_GRAM = {"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
# folders of configurations by name: (operation, device, form, configuration) of each of their files
FOLDERS = {
    "tuned": [
        ("project_rademacher", "NVIDIA H200", None, {"block_b": 32, "block_k": 64}),
        ("gram_product", "A card nobody knows", None, SMALL_GRAM),
        ("sketch", "NVIDIA A100", THIN, {"block_t": 64, "num_warps": 8, "num_stages": 4}),
    ],
    # no card has the memory for it
    "too large": [("project_rademacher", "NVIDIA H200", None, {"block_b": 256, "num_stages": 9})],
    "no operation": [("project_uniform", "NVIDIA H200", None, {"block_b": 32})],
    "no form": [("sketch", "NVIDIA H200", "two taps", {})],
    "no block": [("sketch", "NVIDIA H200", THIN, {"block_t": 48})],
}


def write_configs(folder, operation, device, form, config):
    sizes = {"form": form, "T": 2560} if form else {"B": 8, "P": 2**20, "K": 4096}
    entry = {"sizes": sizes, "config": config}
    folder.mkdir(exist_ok=True)
    (folder / f"{operation}.json").write_text(json.dumps({device: [entry]}))


def call(arguments):
    """What `compile_all.py` prints, or the last it says where it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            compile_all.main(arguments)
    except (Exception, SystemExit) as error:
        return {"failed": "".join(traceback.format_exception_only(error))}
    return {"cases": json.loads(printed.getvalue())}


def gram():
    """Shared memory of the one-pass product by target and kernel; "tuned" has one of them."""
    shared = {}
    for arch, target in compile_all.TARGETS.items():
        shared[arch] = {}
        for name, (kernel, types, constexprs, options) in KERNELS.items():
            signature = dict(t.split(":") for t in types.split())
            signature |= dict.fromkeys(constexprs, "constexpr")
            source = ASTSource(kernel, signature, constexprs)
            built = triton.compile(source, target=target, options=options)
            shared[arch][name] = built.metadata.shared
    return shared


def main():
    out, *words = sys.argv[1:]
    found = {"all": call(words)} | ({} if words else {"gram": gram()})
    for name, files in FOLDERS.items():
        if words and name == "too large":
            continue
        folder = Path(out) / name
        for file in files:
            write_configs(folder, *file)
        found[name] = call([str(folder)])
    (Path(out) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
