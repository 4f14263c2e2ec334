"""What can be known of the kernels without a GPU: that they compile, fit, and how long they are."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SHARED_LIMITS = {  # bytes per program
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TENSOR_MEMORY_COLUMNS = 512
# bytes a thread that Triton before 3.7 spills: loads one by one, and groups with 64-bit offsets
SPILLED_BEFORE_3_7 = {"NCHW": 32, "groups, wide": 232}


def compile_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).parent / "compile_all.py")
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    done = compile_all()
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_every_target(compiled):
    for arch in SHARED_LIMITS:
        kernels = {case["kernel"] for case in compiled if case["arch"] == arch}
        assert kernels >= {"rademacher", "normal", "pack", "reduce", "sketch"}


def test_memory_fits(compiled):
    for case in compiled:
        assert case["shared"] <= SHARED_LIMITS[case["arch"]], case
        # beyond the last column Triton emits a trap in place of the kernel
        assert case["tensor_memory"] <= TENSOR_MEMORY_COLUMNS, case
        assert case["traps"] == 0, case


def test_nothing_spills(compiled):
    is_old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    allowed = SPILLED_BEFORE_3_7 if is_old else {}
    for case in compiled:
        assert case["stack"] <= allowed.get(case.get("form"), 0), case


def test_products_use_matrix_instructions(compiled):
    for case in compiled:
        if case["kernel"] in ("rademacher", "normal"):
            assert case["matrix"] > 0, case


def test_signs_cost_at_most_400_instructions_per_128(compiled):
    cases = [c for c in compiled if c["kernel"] == "rademacher" and c["arch"] == "sm_90"]
    assert cases
    for case in cases:
        signs = case["block_k"] * 256 / (32 * case["num_warps"])
        # less than one operation per two signs means the generator was folded away
        assert 64 <= case["loop"] * 128 / signs <= 400, case


def test_normals_cost_at_most_48_instructions_each(compiled):
    cases = [c for c in compiled if c["kernel"] == "normal" and c["arch"] == "sm_90"]
    assert cases
    for case in cases:
        entries = case["block_k"] * 64 / (32 * case["num_warps"])
        assert 16 <= case["loop"] / entries <= 48, case


def test_sketches_use_matrix_instructions(compiled):
    cases = [c for c in compiled if c["kernel"] == "sketch" and c["dtype"] != "fp32"]
    assert cases
    for case in cases:
        assert case["matrix"] > 0, case


def test_a_flip_costs_at_most_400_instructions(compiled):
    for arch in ("sm_80", "sm_90"):
        loop = {
            c["form"]: c["loop"] for c in compiled if c["kernel"] == "sketch" and c["arch"] == arch
        }
        # less than one operation per entry means the generator was folded away
        assert 64 <= loop["3x3"] - loop["3x3, no flip"] <= 400, (arch, loop)


THIN = "one axis, channels last, 16 bits, tile 128x16"


def write_configs(folder, operation, device, form=None, **config):
    sizes = {"form": form, "T": 2560} if form else {"B": 8, "P": 2**20, "K": 4096}
    entry = {"sizes": sizes, "config": config}
    (folder / f"{operation}.json").write_text(json.dumps({device: [entry]}))


def test_tuned_configurations_are_compiled_for_their_card(tmp_path):
    """What the tests above say of shipped configurations, they say of these."""
    write_configs(tmp_path, "project_rademacher", "NVIDIA H200", block_b=32, block_k=64)
    small = {"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    write_configs(tmp_path, "gram_product", "A card nobody knows", **small)
    write_configs(tmp_path, "sketch", "NVIDIA A100", THIN, block_t=64, num_warps=8, num_stages=4)
    done = compile_all(str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads(done.stdout)
    assert [c["arch"] for c in cases if c["kernel"] == "rademacher"] == ["sm_90"]
    assert [c["arch"] for c in cases if c["kernel"] == "sketch"] == ["sm_80"]
    test_sketches_use_matrix_instructions([c for c in cases if c["kernel"] == "sketch"])
    assert [c["arch"] for c in cases if c["kernel"] == "gram_product"] == list(SHARED_LIMITS)
    test_memory_fits(cases)
    test_nothing_spills(cases)
    # and one that no card has the memory for
    for file in tmp_path.iterdir():
        file.unlink()
    write_configs(tmp_path, "project_rademacher", "NVIDIA H200", block_b=256, num_stages=9)
    cases = json.loads(compile_all(str(tmp_path)).stdout)
    with pytest.raises(AssertionError):
        test_memory_fits(cases)


def test_configurations_of_no_operation_are_refused(tmp_path):
    write_configs(tmp_path, "project_uniform", "NVIDIA H200", block_b=32)
    done = compile_all(str(tmp_path))
    assert done.returncode != 0
    assert "project_uniform.json: no operation is called 'project_uniform'" in done.stderr


@pytest.mark.parametrize(
    "form, config, message",
    [
        ("two taps", {}, "form must be like 'one tap, channels last, 16 bits, .*, got 'two taps'"),
        (THIN, {"block_t": 48}, "sketch.json: block_t must be a power of two from 16 to 256"),
    ],
)
def test_configurations_of_no_sketch_are_refused(form, config, message, tmp_path):
    write_configs(tmp_path, "sketch", "NVIDIA H200", form, **config)
    done = compile_all(str(tmp_path))
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
