"""Shipped kernels with one mistake in their compiled code: the emulator rejects them.

A mistake is made in several places of one kernel. Some barriers and waits are spare, so what is
asked for is at least one rejection, and no other reason than those named.
"""

import pytest
import torch
from emulator import mutants
from emulator.errors import (
    ConflictError,
    EmulationError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    UnfinishedError,
)
from emulator.launch import Emulated
from torch import nn

from dtrak_kernels.dense import triton as dense_kernel
from dtrak_kernels.dense.config import DenseConfig
from dtrak_kernels.ops import Projection
from dtrak_kernels.ridge import gram_triton as gram_kernel
from dtrak_kernels.sjlt import triton as sketch_kernel
from dtrak_kernels.sjlt.config import Form, find_config
from dtrak_kernels.sjlt.torch import ParameterSketch

pytestmark = pytest.mark.emulated


def sketch(arch):
    """Ragged on every axis, several steps of the pipeline, several tiles."""
    torch.manual_seed(0)
    x, grads = torch.randn(2, 190, 144).bfloat16(), torch.randn(2, 190, 130).bfloat16()
    layer, out = nn.Linear(144, 130, bias=False), torch.zeros(2, 16384)
    form = Form((128, 128), torch.bfloat16, is_one_axis=True)
    table = ParameterSketch((130, 144), 0, 16384, 3)
    sketch_kernel.launch_sketch(layer, x, grads, table, out, 1, find_config(form, arch, 190))
    return out


def projection(arch):
    torch.manual_seed(0)
    out = torch.zeros(20, 48)
    config = DenseConfig(128 if arch == 90 else 16, 64, num_warps=4, num_stages=3, splits=2)
    grads, kind = torch.randn(20, 600).half(), Projection("rademacher", 48, seed=3)
    dense_kernel.launch_project(grads, kind, 5, out, config, scale=1.0)
    return out


def gram(arch):
    torch.manual_seed(0)
    return gram_kernel.launch_gram_product(torch.randn(600, 70), torch.randn(70, 5), 1.0)


KERNELS = {
    "sketch": (sketch, sketch_kernel, "_sketch_kernel"),
    "projection": (projection, dense_kernel, "_rademacher_partial_kernel"),
    "gram": (gram, gram_kernel, "_gram_product_partial_kernel"),
}
# what may be the first thing that goes wrong
REASONS = {
    "a barrier is left out": RaceError,
    "a copy's wait is left out": UnfinishedError,
    "a product's wait is left out": UnfinishedError,
    "a proxy fence is left out": RaceError,
    "a product's fence is left out": UnfinishedError,
    "a load is not guarded": OutOfBoundsError,
    "a store is not guarded": (ConflictError, OutOfBoundsError, RaceError),
    "a copy is not guarded": OutOfBoundsError,
    "a load is shifted by two bytes": (MisalignedError, OutOfBoundsError),
    "a store is shifted": OutOfBoundsError,
    "a shared store is shifted": OutOfBoundsError,
    "a shared load is shifted": OutOfBoundsError,
    "a copy's source is shifted": (MisalignedError, OutOfBoundsError),
    "a copy's target is shifted": (MisalignedError, UnfinishedError),
    "a matrix load is shifted": MisalignedError,
}
# the kernels in which a mistake has its consequence; the others lack the instruction, or read
# zeros that other guards already make
WHERE = {
    "a barrier is left out": ("sketch", "projection", "gram"),
    "a copy's wait is left out": ("sketch", "projection", "gram"),
    "a proxy fence is left out": ("sketch", "projection"),
    "a load is not guarded": ("gram",),
    "a store is not guarded": ("projection", "gram"),
    "a copy is not guarded": ("projection",),
    "a copy's target is shifted": ("sketch", "gram"),
}
CASES = [(mistake, kernel) for mistake in REASONS for kernel in WHERE.get(mistake, ("sketch",))]
ONLY_SM_80 = {"a matrix load is shifted"}
ONLY_SM_90 = {
    "a product's wait is left out",
    "a proxy fence is left out",
    "a product's fence is left out",
}
# most telling first: they are run in the fast lane, too
QUICK = {
    ("a barrier is left out", "projection"),
    ("a copy's wait is left out", "projection"),
    ("a store is not guarded", "projection"),
    ("a copy is not guarded", "projection"),
    ("a product's wait is left out", "sketch"),
}


def run(kernel, arch, monkeypatch, edit=None):
    """What a launch gives, and the PTX before the edit."""
    launch, module, name = KERNELS[kernel]
    original = getattr(module, name)
    stand_in = Emulated(getattr(original, "kernel", original), arch, edit)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stand_in)
        result = launch(arch)
    return result, next(iter(stand_in.variants.values())).compiled.ptx


@pytest.mark.parametrize(
    "mistake, kernel",
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.full, id=", ".join(case))
        for case in CASES
    ],
)
def test_mistakes_are_rejected(mistake, kernel, emulated_card, monkeypatch):
    arch = emulated_card.arch
    if (arch == 80 and mistake in ONLY_SM_90) or (arch == 90 and mistake in ONLY_SM_80):
        pytest.skip("the card has no such instruction")
    right, ptx = run(kernel, arch, monkeypatch)
    places = mutants.count(ptx, mistake)
    assert places, "nothing to change"
    rejected = 0
    for place in sorted({round(i * (places - 1) / 2) for i in range(3)}):
        try:
            run(kernel, arch, monkeypatch, mutants.make(mistake, place))
        except REASONS[mistake]:
            rejected += 1
        except EmulationError as error:
            pytest.fail(f"place {place} of {places}: {type(error).__name__}: {error}")
    assert rejected, f"none of {places} places"
    assert torch.isfinite(right).all()


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
def test_barriers_are_needed(kernel, emulated_card, monkeypatch):
    """Nearly every one: which is spare is known, and that no other is."""
    _, ptx = run(kernel, emulated_card.arch, monkeypatch)
    spare = []
    for place in range(mutants.count(ptx, "a barrier is left out")):
        try:
            run(
                kernel,
                emulated_card.arch,
                monkeypatch,
                mutants.make("a barrier is left out", place),
            )
        except RaceError:
            continue
        spare.append(place)
    assert len(spare) <= SPARE[kernel], spare


# barriers before a first iteration, where nobody has read what is overwritten; of the Gram kernel
# also either of two in a row, and one between threads' reads and writes of their own words
SPARE = {"sketch": 1, "projection": 1, "gram": 4}
