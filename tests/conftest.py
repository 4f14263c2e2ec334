"""Lanes: the fast one without `--full`; `gpu` cases are skipped where there is no CUDA device.

The fast lane has a case or more for every code path of the package. The others are `full`: slow and
statistical proofs, what benchmarks do that the smoke run shows too, and of a `sweep` what shows no
value of a parameter that another case does not show. Without a CUDA device Triton kernels are
interpreted. `compiled` cases run where kernels are compiled: on a GPU, and in the emulator
(`emulator.plugin`); `emulated` cases in the emulator only.
"""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

# before torch imports NumPy, whose products are the interpreter's: with threads the last bits of a
# row depend on where it stands
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

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


# files of the longest cases, which begin first, so that no worker ends with one while others wait;
# whole files, so that what their cases share is made once
LONGEST = [
    "readme", "emulated", "torchrun", "golden", "compile", "examples", "packages", "groups",
    "ranks", "benchmarks_tune", "benchmarks_gpu", "benchmarks_predicted", "normals",
    "attribute", "train", "lds", "lds_run", "counterfactual", "kinds_commands", "platforms",
]  # fmt: skip
# files that are of the full lane whole: of benchmarks, which the smoke run has too, and of examples
FULL_FILES = ("test_benchmarks", "test_examples")
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


def one_of_each(items, strength):
    """Of the cases of one sweep enough for every value of every parameter, each about as often.

    With a strength of 2, for every pair of values of two parameters.
    """
    parts = {}
    for item in items:
        # one value is one object in all its cases
        values = [(name, id(value)) for name, value in item.callspec.params.items()]
        parts[item] = set(itertools.combinations(values, min(strength, len(values))))
    left, times, taken = set().union(*parts.values()), Counter(), []
    while left:
        rest = [item for item in items if item not in taken]
        best = max(rest, key=lambda i: (len(parts[i] & left), -sum(times[p] for p in parts[i])))
        taken.append(best)
        times.update(parts[best])
        left -= parts[best]
    return taken


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    # a million objects are made that stay: looking for garbage among them took a third of the time
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # before -m and -k deselect
    for item in items:
        if item.path.stem.startswith(FULL_FILES):
            item.add_marker(pytest.mark.full)
    sweeps = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") and not item.get_closest_marker("full"):
            # a case that is skipped shows nothing
            sweeps[item.nodeid.partition("[")[0], "gpu" in item.keywords].append(item)
    for cases in sweeps.values():
        strength = next(iter(cases[0].get_closest_marker("sweep").args), 1)
        taken = one_of_each(cases, strength)
        for item in cases:
            if item not in taken:
                item.add_marker(pytest.mark.full)
    # and after
    yield
    others = [] if is_full(config) else [item for item in items if "full" in item.keywords]
    if others:
        items[:] = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=others)
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    need_gpu = [item for item in items if "gpu" in item.keywords]
    if torch.cuda.is_available():
        need_gpu = []
    for item in need_gpu:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "DTRAK_EMULATED" not in os.environ:
        elsewhere = pytest.mark.skip(reason="test_emulated.py runs it in a process of its own")
        for item in items:
            # a fixture is called compiled as well
            compiled = item.get_closest_marker("compiled") and not torch.cuda.is_available()
            if compiled or item.get_closest_marker("emulated"):
                item.add_marker(elsewhere)
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


def _contents(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    found = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    # what claims work in a folder is no part of it
    return [[n, s.st_size, s.st_mtime_ns] for n, s in found if not n.endswith(".lock")]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """``shared(name, make)``: the folder that ``make(folder)`` fills, once for all workers.

    It is there to be read; a test that writes takes a copy.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    used = {}

    def shared(name, make):
        folder, listing = base / "shared" / name, base / "shared" / f"{name}.json"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not listing.is_file():
                # another worker may have failed at it
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                listing.write_text(json.dumps(_contents(folder)))
        used[folder] = json.loads(listing.read_text())
        return folder

    yield shared
    for folder, contents in used.items():
        assert _contents(folder) == contents, f"a test wrote to {folder}, which others read"


@pytest.fixture(scope="session")
def tiny_pipeline(shared):
    """A Stable Diffusion in miniature."""
    from tiny_stable_diffusion import build_pipeline

    build = lambda folder: build_pipeline(folder / "pipeline")
    return shared("stable-diffusion", build) / "pipeline"


@pytest.fixture(scope="session")
def finished(shared):
    """A finished run of the main job, its images and its model beside it."""
    from finished_run import make_run

    return shared("finished", lambda folder: make_run(folder / "here")) / "here" / "run"


@pytest.fixture(scope="session")
def trained_lds(shared):
    """The tiny LDS: four subsets, the full model and theirs trained, nothing measured."""
    from tiny_lds import trained

    train = lambda folder: trained(folder / "run", num_subsets=4)
    return shared("lds", train) / "run"


@pytest.fixture(scope="session")
def compiled(shared, pytestconfig):
    """What the compiler makes of the kernels for cards that need not be there."""

    def compile_all(folder):
        script = Path(__file__).with_name("compile_jobs.py")
        words = [] if is_full(pytestconfig) else ["few"]
        done = subprocess.run(
            [sys.executable, str(script), str(folder), *words],
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return json.loads((shared("compiled", compile_all) / "found.json").read_text())


@pytest.fixture(autouse=True)
def quick_pictures(request, pytestconfig, monkeypatch):
    """In the fast lane runs leave a small picture, but where a test is of `pictures`."""
    attribution = sys.modules.get("dtrak.cli.attribution")
    if attribution is None or is_full(pytestconfig) or "pictures" in request.keywords:
        return
    monkeypatch.setattr(attribution, "write_picture", _write_small)


def _write_small(file: Path, explained) -> None:
    from PIL import Image

    Image.new("RGB", (70, 40)).save(file)


@pytest.fixture(scope="session")
def clip_folder(shared):
    from tiny_encoders import build_clip

    return shared("clip", build_clip)


@pytest.fixture(scope="session")
def dino_folder(shared):
    from tiny_encoders import build_dino

    return shared("dino", build_dino)


@pytest.fixture(scope="session")
def vae_folder(shared):
    from tiny_encoders import build_vae

    return shared("vae", build_vae)


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
    presets = sys.modules.get("dtrak.training.presets")
    before = dict(presets.PRESETS) if presets else None
    yield
    presets = sys.modules.get("dtrak.training.presets")
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
