"""The one-pass product compiles for every target, without a device and within its shared memory."""

import json
import os
import subprocess
import sys

import pytest

# (backend, architecture, warp size, bytes of shared memory a program may use)
TARGETS = {
    "sm80": ("cuda", 80, 32, 163 * 1024),
    "sm90": ("cuda", 90, 32, 227 * 1024),
    "sm100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}

SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dtrak_kernels.ridge.gram_triton import KERNELS

backend, arch, warp = json.loads(sys.argv[1])
shared = {}
for name, (kernel, types, constexprs, options) in KERNELS.items():
    signature = dict(t.split(":") for t in types.split()) | dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(kernel, signature, constexprs)
    built = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    shared[name] = built.metadata.shared
sys.stdout.write(json.dumps(shared))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles(target):
    *arguments, limit = TARGETS[target]
    # an interpreted kernel cannot be compiled: a process of its own
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert len(shared) == 3
    assert max(shared.values()) <= limit, shared
