"""Where the systems differ. Windows is acted here, not run: its modules stand in for ours."""

import json
import os
import re
import subprocess
import sys

import pytest

# a stand-in for Windows' locks: bytes of a file, held by one open file each, across processes
MSVCRT = """
import errno, fcntl as _posix, os
LK_NBLCK, LK_UNLCK = 2, 0
calls = []

def locking(descriptor, mode, count):
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    calls.append((mode, start, count))
    how = _posix.LOCK_UN if mode == LK_UNLCK else _posix.LOCK_EX | _posix.LOCK_NB
    try:
        _posix.lockf(descriptor, how, count, start)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None
"""
# subprocess asks for msvcrt to tell where it is: it is loaded before
WINDOWS = """
import subprocess, sys
import windows_locks as msvcrt
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "resource"):
    sys.modules[name] = None
"""
CLAIM = """
import pathlib
from dtrak.runs.files import claim
part = eval(sys.argv[2])
with claim(pathlib.Path(sys.argv[1]), part=part, wait=len(sys.argv) > 3) as ours:
    print(ours, flush=True)
    sys.stdin.read()
print(msvcrt.calls)
"""
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is made of fcntl")


@pytest.fixture
def windows(tmp_path):
    """Start Python where Windows' modules are, and ours for POSIX are not."""
    (tmp_path / "windows_locks.py").write_text(MSVCRT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(code, *arguments, first=""):
        return subprocess.Popen(
            [sys.executable, "-c", first + WINDOWS + code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


@needs_posix
@pytest.mark.parametrize(
    "held, wanted, ours",
    [
        ("None", "None", False),
        ("range(4, 8)", "range(8, 10)", True),
        ("range(4, 8)", "range(7, 9)", False),
        ("range(4, 8)", "range(4)", True),
    ],
)
def test_locks_as_windows_has_them(windows, tmp_path, held, wanted, ours):
    file = tmp_path / "folder" / ".lock"
    first = windows(CLAIM, file, held)
    assert first.stdout.readline() == "True\n"
    second = windows(CLAIM, file, wanted)
    assert second.stdout.readline() == f"{ours}\n"
    second.communicate("")
    # let go of at the end, and by a process that is killed
    calls = first.communicate("")[0]
    start = 4 if "4" in held else 2**40
    count = 4 if "4" in held else 1
    assert calls == f"{[(2, start, count), (0, start, count)]}\n"
    third = windows(CLAIM, file, wanted)
    assert third.stdout.readline() == "True\n"
    waiting = windows(CLAIM, file, wanted, "wait")
    third.kill()
    assert waiting.stdout.readline() == "True\n"
    waiting.communicate("")
    third.communicate()


# the modules that only Linux has are missing, and /proc too
NOT_LINUX = """
import json, pathlib
sys.modules["triton"] = None
read = pathlib.Path.read_text
def read_text(self, *arguments, **options):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(str(self))
    return read(self, *arguments, **options)
pathlib.Path.read_text = read_text
import torch
"""


@needs_posix
def test_everything_imports_and_projects_without_fcntl_resource_and_triton(windows):
    code = """
import dtrak, dtrak_kernels
import dtrak.cli.attribute, dtrak.cli.counterfactual, dtrak.cli.lds, dtrak.cli.train
import dtrak.data.images, dtrak.runs.measure, dtrak.runs.record, dtrak.runs.workers
grads = torch.ones(2, 300)
for kind in ("rademacher", "normal"):
    assert dtrak_kernels.project(grads, dtrak_kernels.Projection(kind, 64)).shape == (2, 64)
sketch = dtrak_kernels.project(grads, dtrak_kernels.Projection("sjlt", 256), shapes=[(15, 20)])
assert sketch.shape == (2, 256)
model = torch.nn.Linear(20, 15)
sketcher = dtrak_kernels.GradientSketcher(model, dtrak_kernels.Projection("sjlt", 256))
assert sketcher.sketch(lambda: model(torch.ones(2, 20)).sum(1), 2).shape == (2, 256)
print(json.dumps(sys.modules["triton"] is None and sys.modules["fcntl"] is None))
"""
    process = windows(NOT_LINUX + code)
    assert json.loads(process.communicate()[0].splitlines()[-1]) is True


# slow: everything is imported, and a model trained
@pytest.mark.full
@needs_posix
def test_the_main_job_runs_without_fcntl_resource_and_triton(windows, tmp_path):
    code = """
from rich.console import Console
import finished_run
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
run = finished_run.results(finished_run.make_run(folder))
import dtrak.cli.attribution, dtrak.cli.counterfactual_experiment, dtrak.cli.lds_stages
import dtrak.methods.baselines, dtrak.pages.report, dtrak.training.drawing
import dtrak.evaluation.retraining, dtrak.training.command
print(json.dumps([
    (run / "scores.safetensors").is_file(),
    {stage["peak_bytes"] for stage in json.loads((run / "manifest.json").read_text())["stages"]}
    == {0},
    sys.modules["triton"] is None and sys.modules["fcntl"] is None,
]))
"""
    code = f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n{NOT_LINUX}{code}"
    # other libraries ask for the system, and then import what this one has
    first = "from diffusers import UNet2DModel\n"
    process = windows(code, tmp_path / "work", first=first)
    assert json.loads(process.communicate()[0].splitlines()[-1]) == [True, True, True]


def test_apples_gpu_is_left_alone(monkeypatch):
    import torch

    from dtrak.runs.console import choose_device
    from dtrak.training.trainer import make_accelerator

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    assert make_accelerator("auto", "no").device.type == "cpu"
    for name in ("mps", "mps:0"):
        with pytest.raises(ValueError, match=re.escape(f"got {name!r}: ")):
            choose_device(name)
