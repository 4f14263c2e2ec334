"""The model of a kernel's time: instructions counted by pipe and loop, and what follows from it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "modelled.py"
# nvdisasm's form: two loops inside one, the branch to itself that ends all code
SASS = """
.text.kernel:
        /*0000*/                   IMAD.WIDE R2, R0, 0x4, R2 ;
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LOP3.LUT R5, R4, R6, RZ, 0x3c, !PT ;
.L_x_0:
        /*0030*/                   FFMA R7, R5, R4, R7 ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   MUFU.RSQ R9, R9 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   STS [R10], R9 ;
        /*0090*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*00a0*/               @P3 BRA `(.L_x_1) ;
        /*00b0*/                   SHF.R.U32.HI R1, RZ, 0x1, R1 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
"""


def run(code: str) -> dict:
    """In a process of its own: what compiles must not be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *([before] if before else [])])
    done = subprocess.run(
        [sys.executable, "-c", f"import json, modelled as m\n{code}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


LAUNCHES = """
import compile_all
from dataclasses import replace

compiled, launches, rows = [], [], []
compile_all.compile_kernel = lambda *what, **options: compiled.append((what[2], options))

class Recorder:
    def __getitem__(self, grid):
        return lambda **arguments: launches.append(arguments | {"grid": grid[0]})

m.sketch_kernel._sketch_kernel = Recorder()
for layer in m.SKETCHED:
    # one sample is launched like many; without a GPU the default is that of an A100
    layer = replace(layer, samples=1)
    case = m.sketch_case(layer, m.CARDS["A100"])
    case.build(None)
    inputs = layer.make(m.torch.device("cpu"))
    out = m.torch.zeros(1, layer.proj_dim)
    launches.clear()
    m.sketch_kernel.launch_sketch(*inputs, layer.sketch, out, layer.timesteps)
    (launch,), (constants, options) = launches, compiled[-1]
    # without groups nobody reads how many rows one has
    names = set(constants) & set(launch) - {"rows_per_group"}
    tables = launch["blocks_ptr"], launch["tiles_ptr"]
    rows.append({
        "names": sorted(names),
        "modelled": [constants[name] for name in sorted(names)],
        "launched": [launch[name] for name in sorted(names)],
        "options": [options["num_warps"], options["num_stages"], case.warps, case.programs],
        "launched_options": [launch[n] for n in ("num_warps", "num_stages", "num_warps", "grid")],
        "trips": case.trips,
        # tiles of a block on average, steps of the reduction
        "launched_trips": [
            len(tables[1]) / len(tables[0]),
            -(-launch["rows_per_sample"] * launch["HO"] * launch["WO"] // launch["BLOCK_T"]),
        ],
        "bytes": case.bytes,
        "moved": sum(a.numel() * a.element_size() for a in inputs[1:])
        + 8 * len(tables[0]) * launch["BM"] * launch["BN"],
    })
"""


@pytest.fixture(scope="module")
def found() -> dict:
    """Everything that compiles, in one process."""
    return run(f"""
import contextlib, io, pathlib, sys, tempfile
import torch
h200, a100 = m.CARDS["H200"], m.CARDS["A100"]
make = lambda C, card, dtype=torch.bfloat16: m.product_case("rademacher", 128, C, 4096, dtype, card)
found = {{
    "short": m.cost(make(2**18, h200), h200),
    "long": m.cost(make(2**20, h200), h200),
    "a100": m.cost(make(2**20, a100), a100),
    "gram": m.cost(m.gram_case(5000, 4096, 32), h200),
}}
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["modelled.py", "--smoke", "--card", "A100", "--out", folder]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = m.main()
    written = (pathlib.Path(folder) / "modelled.jsonl").read_text()
{LAUNCHES}
print(json.dumps(found | {{"main": [status, said.getvalue(), written], "launches": rows}}))""")


@pytest.fixture(scope="module")
def m():
    """The module itself, for what compiles nothing."""
    sys.path.insert(0, str(SCRIPT.parent))
    # it takes a variable away that other tests' processes need
    with mock.patch.dict(os.environ):
        return importlib.import_module("modelled")


def test_loops_nest(m):
    root = m.read_loops(SASS)
    assert root.own == {"imad": 1, "alu": 1, "other": 2}
    (outer,) = root.inner
    assert outer.own == {"lsu": 2, "alu": 1, "other": 2}
    assert [loop.own for loop in outer.inner] == [
        {"fma": 1, "matrix": 1, "other": 1},
        {"xu": 1, "other": 1},
    ]


def test_what_is_executed_is_what_loops_repeat(m):
    root = m.read_loops(SASS)
    # three times round the outer loop, ten times round each inner one
    assert root.total((3, 10)) == {
        "imad": 1,
        "alu": 1 + 3,
        "lsu": 2 * 3,
        "fma": 3 * 10,
        "matrix": 3 * 10,
        "xu": 3 * 10,
        "other": 2 + 3 * 2 + 3 * 10 * 2,
    }
    # a loop whose length is not given runs once
    once = root.total(())
    assert once["fma"] == once["xu"] == 1


def test_instructions_have_their_pipes(m):
    names = [
        "@!P0 LOP3.LUT R1, R2, R3", "@P1 IMAD.HI.U32 R1", "FFMA R1", "HGMMA.64x64 R1",
        "MUFU.LG2 R1", "UIADD3 UR4", "LDGSTS.E.128 [R1]", "I2FP.F32.S32 R1", "BRA `(x)",
        "@!UP2 UMOV UR1", "PRMT R1", "WARPGROUP.ARRIVE", "LDL R1", "ISETP.GE.AND P0",
    ]  # fmt: skip
    assert [m.pipe_of(name) for name in names] == [
        "alu",
        "imad",
        "fma",
        "matrix",
        "xu",
        "other",
        "lsu",
        "xu",
        "other",
        "other",
        "alu",
        "matrix",
        "lsu",
        "alu",
    ]


# slow: a process that compiles kernels, as test_compile.py does in the fast lane
@pytest.mark.full
def test_matrix_time_is_the_work_over_the_rate(found):
    """Products of 128 samples, whole programs on the fullest multiprocessor."""
    # 64 blocks of K in two waves' worth of spans: as many programs as fill the card
    seconds = 2 * 128 * 2**20 * 4096 / 989e12
    assert seconds <= found["long"]["matrix"] < 1.3 * seconds
    assert found["long"]["memory"] > 2 * 128 * 2**20 / 4.8e12


# slow: a process that compiles kernels, as test_compile.py does in the fast lane
@pytest.mark.full
def test_time_grows_with_the_work_and_with_a_lesser_card(found):
    for resource in ("issue", "alu", "imad", "lsu", "matrix"):
        ratio = found["long"][resource] / found["short"][resource]
        assert 2.5 < ratio < 4.1, resource
    assert 2 < found["a100"]["matrix"] / found["long"]["matrix"] < 4
    # of the plain Triton kernel the compiled code is budgeted at most 400 operations per 128 signs
    signs = 2**20 * 4096
    busy = signs * 400 / 128 / (132 * 128 * 1.83e9)
    assert 0.1 * busy < found["long"]["issue"] < 1.5 * busy


# slow: a process that compiles kernels, as test_compile.py does in the fast lane
@pytest.mark.full
def test_products_without_matrix_units_are_limited_by_others(found):
    assert found["gram"]["matrix"] == 0
    # two multiply-adds per feature and vector
    floor = 2 * 5000 * 4096 * 32 / (132 * 128 * 1.83e9)
    assert floor < found["gram"]["fma"] < 3 * floor


def test_cards_are_found_by_name(m):
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Quadro")
    found = [getattr(m.find_card(name), "name", None) for name in names]
    assert found == ["H200", "A100", None]


# slow: a process that compiles kernels, as test_compile.py does in the fast lane
@pytest.mark.full
def test_sketches_are_modelled_as_they_are_launched(found):
    """The constants, the configuration, the loops and the bytes of the launch itself."""
    assert found["launches"]
    for row in found["launches"]:
        assert {"BLOCK_T", "BM", "BN", "IS_ONE_TAP", "HO", "INPUT_PRECISION"} <= set(row["names"])
        assert row["modelled"] == row["launched"]
        assert row["options"] == row["launched_options"]
        assert row["trips"] == row["launched_trips"]
        assert row["bytes"] == row["moved"]


# slow: a process that compiles kernels, as test_compile.py does in the fast lane
@pytest.mark.full
def test_it_says_that_it_is_a_model(found):
    status, said, written = found["main"]
    assert status == 0, said
    assert said.startswith("A100: a model: ")
    assert "not measured" in said
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["note"].startswith("a model")
        assert row["measured_seconds"] is None
        assert row["modelled_seconds"] == max(row["parts"].values())
