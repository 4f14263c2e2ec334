"""Kernels are compiled before the first batch: the ones it launches, side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrak_kernels import GradientSketcher, Projection, compiling
from dtrak_kernels.dense import triton as dense_kernel
from dtrak_kernels.sjlt import triton as sketch_kernel

HERE = Path(__file__).parent


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def batch(kind, model):
    """A batch of features by the kernels, as a function."""
    x = torch.randn(3, 3, 4, 4)
    sketcher = GradientSketcher(model, Projection(kind, 256), implementation="triton")
    return lambda: sketcher.sketch(lambda: model(x).square().mean(1), 3)


@pytest.mark.filterwarnings("ignore:.*random numbers")
@pytest.mark.parametrize("kind", ["sjlt", pytest.param("rademacher", marks=pytest.mark.full)])
def test_a_rehearsal_notes_what_a_batch_launches(kind, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("counts interpreted launches")
    launched = []

    def counted(kernel, grid, **arguments):
        launched.append((kernel, arguments))
        compiling.launch(kernel, grid, **arguments)

    for module in (dense_kernel, sketch_kernel):
        monkeypatch.setattr(module, "launch", counted)
    run = batch(kind, small_model())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = compiling.rehearse(run)
    assert torch.equal(torch.get_rng_state(), before)
    noted = list(launched)
    launched.clear()
    features = run()
    assert found.launches == len(launched) == len(noted) > 1
    assert [kernel for kernel, _ in noted] == [kernel for kernel, _ in launched]
    names = [kernel.__name__ for kernel, _, _ in found.wanted.values()]
    assert set(names) == {kernel.__name__ for kernel, _ in launched}
    # memory is not kept
    kept = [a for _, _, arguments in found.wanted.values() for a in arguments.values()]
    assert not any(isinstance(a, torch.Tensor) for a in kept)
    torch.set_rng_state(before)
    assert torch.equal(run(), features)


def test_a_rehearsal_ends_with_its_error():
    with pytest.raises(RuntimeError, match="must not be inside of another one"):
        compiling.rehearse(lambda: compiling.rehearse(lambda: None))
    assert compiling.rehearse(lambda: None).launches == 0
    # where nothing is launched nothing is compiled: no Triton is needed
    assert compiling.compile_ahead(lambda: None) == 0


def test_the_line_is_silent_where_nothing_takes_long(capsys):
    line = compiling.ProgressLine()
    line(0, 2)
    line(2, 2)
    assert capsys.readouterr().err == ""
    line = compiling.ProgressLine(patience=0)
    for done in range(4):
        line(done, 3)
    lines = capsys.readouterr().err.splitlines()
    # no terminal: the first and the last
    assert [text.partition(": ")[2] for text in lines] == ["0 of 3", "3 of 3"]


# without a GPU: Triton is told of a card, for which it compiles and on which nothing runs
CARD = """
import json, sys
from unittest import mock
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Card:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Card())
import test_compiling as t
from dtrak_kernels import compiling

kernels, said = [t.sketch_kernel._sketch_kernel, t.dense_kernel._rademacher_partial_kernel], []
kernels += [t.dense_kernel._pack_kernel, t.dense_kernel._reduce_kernel]
with mock.patch.object(t.dense_kernel, "IS_INTERPRETED", True):
    model = t.small_model().eval()
    runs = [t.batch(kind, model) for kind in ("sjlt", "rademacher")]
    counts = [
        compiling.compile_ahead(run, progress=lambda *n: said.append(n), workers=2) for run in runs
    ]
    compiled = [type(k).__name__ for kernel in kernels for k in kernel.device_caches[0][0].values()]
    # launches, as far as they go without a card: they find everything compiled
    launch, missed = compiling.launch, []
    def look(kernel, grid, **arguments):
        kernel.compile = lambda *a, **k: missed.append(kernel.__name__)
        kernel.warmup(grid=grid, **arguments)
    for module in (t.dense_kernel, t.sketch_kernel):
        module.launch = look
    for run in runs:
        run()
print(json.dumps([counts, said, compiled, missed]))
"""


# slow: compiles; what a batch launches is noted in the fast lane
@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has its own card")
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.full), 90])
def test_launches_find_their_kernels_compiled(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *([before] if before else [])])
    done = subprocess.run(
        [sys.executable, "-c", CARD, str(arch)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts, said, compiled, missed = json.loads(done.stdout)
    assert missed == []
    assert counts[0] >= 2
    assert counts[1] >= 3
    assert said == [[n, count] for count in counts for n in range(count + 1)]
    assert compiled == ["CompiledKernel"] * sum(counts)
