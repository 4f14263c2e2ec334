"""Predictions put together from compiled code and counts: what is extrapolated is what is there."""

import math

import pytest
from test_benchmarks_modelled import run

# it compiles and emulates
pytestmark = pytest.mark.full

# 3 x 3 tiles in two blocks, ten steps and a half
LAYER = """
import predicted as p
from workloads import LayerShape

options = (("in_features", 300), ("out_features", 260), ("bias", False))
shape, samples, compiler = LayerShape("linear", options, (33,  300)), 2, p.Compiler(90)
(launch,) = p.launches_of(shape, samples, 90)

# the same launch, all of it
x, d = (torch.zeros(samples * p.S, 33, width).bfloat16() for width in (300, 260))
stand_in = p.Emulated(p.sketch_kernel._sketch_kernel, 90, counts=True)
with p.mock.patch.object(p.sketch_kernel, "_sketch_kernel", stand_in), p.mock.patch.object(
    p.sketch_kernel, "config_on", lambda device, form, T: p.sketch_config.find_config(form, 90, T)
):
    sketch = p.ParameterSketch((260, 300), 0, p.WIDTH, 1)
    out = torch.zeros(samples, p.WIDTH)
    p.sketch_kernel.launch_sketch(shape.make(), x, d, sketch, out, p.S)
(variant,) = stand_in.variants.values()
products = sum(
    times * p.operand_wavefronts(i, 8)
    for (first, last), times in variant.runs.items()
    for i in variant.code.program.instructions[first : last + 1]
    if i.parts[:2] == ["wgmma", "mma_async"]
)
row = p.predict(shape, samples, p.CARDS["H200"], compiler)
tiles = launch.arguments["tiles_ptr"].shape[0] / launch.arguments["blocks"]
print(json.dumps({
    "programs": [launch.programs, variant.blocks],
    "tiles": tiles,
    "positions": launch.positions,
    "counted": {k: v * launch.programs for k, v in compiler.counts(launch, tiles).items()},
    "whole": {
        "shared": products + sum(a.units for a in variant.traffic.shared.values()),
        "l2": variant.traffic.l2_bytes,
    },
    "row": {k: v for k, v in row.items() if k != "variants"},
    "resident": [
        p.Program(None, registers, shared).resident(90, warps)
        for registers, shared, warps in ((255, 0, 8), (32, 0, 8), (32, 100_000, 4), (40, 0, 4))
    ],
    "lines": p.make_table(),
    "page": p.TABLE.page.read_text(),
}))
"""


@pytest.fixture(scope="module")
def found():
    return run("import torch\n" + LAYER)


def test_the_documented_tables_are_the_newest_row(found):
    assert "\n".join(found["lines"]) in found["page"]


def test_a_tile_or_two_tell_what_a_launch_moves(found):
    """Masked tiles at the edges load less; nothing moves more."""
    assert found["programs"][0] == found["programs"][1]
    assert found["positions"] == 330
    for name, whole in found["whole"].items():
        assert whole <= found["counted"][name] < 1.35 * whole, name
    assert found["counted"]["conflicts"] == 0


def test_a_prediction_is_no_less_than_the_work_at_the_nominal_rate(found):
    row = found["row"]
    work = 2 * 2 * found["tiles"] * row["programs"] / 2 * 128 * 128 * 330
    assert math.isclose(row["flop"], work)
    assert row["parts"]["matrix"] >= work / 989e12
    assert row["seconds"] == max(row["parts"].values()) >= row["ideal"]
    assert row["limit"] in row["parts"]


def test_programs_that_a_multiprocessor_holds(found):
    # registers; threads; shared memory; registers again
    assert found["resident"] == [1, 8, 2, 12]
