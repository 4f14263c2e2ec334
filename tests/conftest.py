"""Lanes: without a CUDA device Triton kernels are interpreted, and `gpu` tests are skipped.

`compiled` tests run where kernels are compiled: on a GPU, and in the emulator (`emulator.plugin`);
`emulated` tests in the emulator only.
"""

import os
import sys

# before torch imports NumPy, whose products are the interpreter's: with threads the last bits of a
# row depend on where it stands
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

# read once, by the @triton.jit decorator: set before any kernel module is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# float32 is float32 on a GPU, too: convolutions round to TF32 by default
torch.backends.cudnn.allow_tf32 = False
# workers that run side by side share the cores, also in the processes they start
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
# nothing in the tests may reach for a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    on_gpu, emulated = torch.cuda.is_available(), "DTRAK_EMULATED" in os.environ
    skip = pytest.mark.skip(reason="no CUDA device")
    skip_here = pytest.mark.skip(reason="test_emulated.py runs it in a process of its own")
    for item in items:
        if "gpu" in item.keywords and not on_gpu:
            item.add_marker(skip)
        elif not emulated and (
            "emulated" in item.keywords or ("compiled" in item.keywords and not on_gpu)
        ):
            item.add_marker(skip_here)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison_empty():
    """Fill every torch.empty with NaN, so an output element nothing wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _only_our_presets():
    presets = sys.modules.get("dtrak.presets")
    before = dict(presets.PRESETS) if presets else None
    yield
    presets = sys.modules.get("dtrak.presets")
    if presets:
        extra = before or {k: v for k, v in presets.PRESETS.items() if not k.startswith("tiny")}
        presets.PRESETS.clear()
        presets.PRESETS.update(extra)


@pytest.fixture(autouse=True)
def only_our_presets():
    """What a test adds to the presets, or changes, is gone for the next one."""
    yield from _only_our_presets()


@pytest.fixture(autouse=True, scope="module")
def only_our_presets_after_a_file():
    """The same of what fixtures of a file add."""
    yield from _only_our_presets()
