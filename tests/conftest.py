"""Lanes: the fast one without `--full`; `gpu` cases are skipped where there is no CUDA device.

The fast lane has one case or more for every code path; `full` marks the others: further values of
a sweep, and slow or statistical proofs. Without a CUDA device Triton kernels are interpreted.
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


# cases of other lanes, by worker where there are several: every worker collects all of them
LEFT_OUT = pytest.StashKey[list[tuple[int, int]]]()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the cases of the full lane as well")


def is_full(config) -> bool:
    """Whether cases of the full lane run: they were asked for, as a lane or by name."""
    by_name = any("::" in argument for argument in config.args)
    return config.option.full or by_name or "full" in config.option.markexpr


def pytest_configure(config):
    config.stash[LEFT_OUT] = []
    try:
        from hypothesis import settings
    except ImportError:
        # a machine with a GPU may lack it
        return
    for name, examples in (("fast", 8), ("full", 40)):
        settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True)
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("full" if is_full(config) else "fast")


# after what -m and -k deselect
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    others = [] if is_full(config) else [item for item in items if "full" in item.keywords]
    if others:
        items[:] = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=others)
    need_gpu = [item for item in items if "gpu" in item.keywords]
    if torch.cuda.is_available():
        need_gpu = []
    for item in need_gpu:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    left_out = (len(others), len(need_gpu))
    config.stash[LEFT_OUT].append(left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    left_out = getattr(node, "workeroutput", {}).get("left_out")
    if left_out:
        node.config.stash[LEFT_OUT].append(tuple(left_out))


# outside of the terminal's own, whose last line this follows
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    counts = session.config.stash[LEFT_OUT]
    if terminal and counts and not hasattr(session.config, "workeroutput"):
        full, gpu = max(counts)
        lanes = [
            f"{full} of the full lane (make test-full)" if full else "",
            f"{gpu} that need a GPU" if gpu else "",
        ]
        terminal.write_line(f"left out: {', '.join(filter(None, lanes)) or 'nothing'}")
    return result


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
