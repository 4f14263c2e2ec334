"""What launches move, counted: on patterns whose counts are known, and in the shipped kernels."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator.errors import SerializedWarning
from emulator.launch import Emulated
from emulator.traffic import Traffic
from torch import nn

from dtrak_kernels.dense.config import default_config
from dtrak_kernels.dense.triton import launch_project
from dtrak_kernels.projection import Projection
from dtrak_kernels.sjlt import triton as sketch_kernel
from dtrak_kernels.sjlt.config import Form, find_config
from dtrak_kernels.sjlt.torch import ParameterSketch

LANES = np.arange(64)[None, :]
ALL = np.ones((1, 64), bool)


@pytest.mark.parametrize(
    "offsets, nbytes, wavefronts",
    [
        # one word each; all the same word; the same bank; every other bank
        (LANES * 4, 4, 2),
        (LANES * 0, 4, 2),
        (LANES * 128, 4, 64),
        (LANES * 8, 4, 4),
        # halves of words share banks
        (LANES * 2, 2, 2),
        # vectors are served by halves and quarters of a warp
        (LANES * 16, 16, 8),
        (LANES * 8, 8, 4),
        (LANES * 128, 16, 64),
    ],
)
def test_wavefronts_of_shared_memory(offsets, nbytes, wavefronts):
    traffic = Traffic()
    traffic.add_shared(1, offsets, ALL, nbytes)
    assert (traffic.shared[1].warps, traffic.shared[1].units) == (2, wavefronts)


def test_lanes_that_do_not_take_part_meet_nobody():
    traffic = Traffic()
    traffic.add_shared(1, LANES * 128, LANES < 3, 4)
    assert vars(traffic.shared[1]) == {"warps": 1, "units": 3, "least": 1}


@pytest.mark.parametrize(
    "offsets, nbytes, l2, memory",
    [(LANES * 4, 4, 256, 256), (LANES * 0, 4, 64, 32), (LANES * 32, 4, 2048, 2048)],
)
def test_sectors_of_global_memory(offsets, nbytes, l2, memory):
    traffic = Traffic()
    traffic.add_global(1, offsets + 4096, ALL, nbytes)
    assert (traffic.l2_bytes, traffic.memory_bytes) == (l2, memory)


@pytest.mark.emulated
@pytest.mark.full
def test_a_roll_meets_no_bank_twice(emulated_card, monkeypatch):
    """One linear layer of a single tile: its sum passes through shared memory without conflicts."""
    torch.manual_seed(0)
    x, grads = torch.randn(1, 64, 128).bfloat16(), torch.randn(1, 64, 128).bfloat16()
    form = Form((128, 128), torch.bfloat16, is_one_axis=True)
    kernel = getattr(sketch_kernel._sketch_kernel, "kernel", sketch_kernel._sketch_kernel)
    stand_in = Emulated(kernel, emulated_card.arch, counts=True)
    monkeypatch.setattr(sketch_kernel, "_sketch_kernel", stand_in)
    sketch_kernel.launch_sketch(
        nn.Linear(128, 128, bias=False),
        x,
        grads,
        ParameterSketch((128, 128), 0, 16384, 3),
        torch.zeros(1, 16384),
        1,
        find_config(form, emulated_card.arch, 64),
    )
    variant = next(iter(stand_in.variants.values()))
    opcodes = {i.line: i.opcode for i in variant.code.program.instructions}
    # the gather of the roll: single words
    gathers = [a for line, a in variant.traffic.shared.items() if opcodes[line] == "ld.shared.b32"]
    assert sum(a.warps for a in gathers) >= 128 * 128 / 32
    assert sum(a.units for a in gathers) == sum(a.least for a in gathers)
    # what is read at all: both inputs, the features, the tables
    least = 2 * 2 * 64 * 128 + 4 * 16384
    assert least <= variant.traffic.memory_bytes <= least + 1024


@pytest.mark.emulated
@pytest.mark.full
def test_products_of_normals_do_not_wait_for_one_another(emulated_card, monkeypatch):
    """With the default configuration; with a deeper pipeline ptxas would serialize them."""
    torch.manual_seed(0)
    grads, projection = torch.randn(100, 700).half(), Projection("normal", 128, seed=3)
    default = default_config(emulated_card.arch, "normal")
    results = []
    for config in (default, replace(default, num_stages=3)):
        out = torch.zeros(100, 128)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", SerializedWarning)
            launch_project(grads, projection, 0, out, replace(config, splits=2))
        serialized = any(issubclass(w.category, SerializedWarning) for w in told)
        assert serialized == (config is not default and emulated_card.arch == 90)
        results.append(out)
    assert torch.equal(*results)
