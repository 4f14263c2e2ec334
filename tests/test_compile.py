"""What can be known of the kernels without a GPU: that they compile, fit, and how long they are."""

import re
from importlib.metadata import version

import pytest
from compile_all import FEW
from conftest import is_full

SHARED_LIMITS = {  # bytes per program
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TENSOR_MEMORY_COLUMNS = 512
# bytes a thread that Triton before 3.7 spills: loads one by one, and groups with 64-bit offsets
SPILLED_BEFORE_3_7 = {"NCHW": 32, "groups, wide": 232}


@pytest.fixture(scope="module")
def cases(compiled) -> list[dict]:
    assert "cases" in compiled["all"], compiled["all"]["failed"][-4000:]
    return compiled["all"]["cases"]


def test_every_kernel_compiles_for_every_target(cases, pytestconfig):
    for arch in SHARED_LIMITS if is_full(pytestconfig) else (FEW,):
        kernels = {case["kernel"] for case in cases if case["arch"] == arch}
        assert kernels >= {"rademacher", "normal", "pack", "reduce", "sketch"}


def test_memory_fits(cases):
    for case in cases:
        assert case["shared"] <= SHARED_LIMITS[case["arch"]], case
        # beyond the last column Triton emits a trap in place of the kernel
        assert case["tensor_memory"] <= TENSOR_MEMORY_COLUMNS, case
        assert case["traps"] == 0, case


def test_nothing_spills(cases):
    is_old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    allowed = SPILLED_BEFORE_3_7 if is_old else {}
    for case in cases:
        assert case["stack"] <= allowed.get(case.get("form"), 0), case


def test_products_use_matrix_instructions(cases):
    for case in cases:
        if case["kernel"] in ("rademacher", "normal"):
            assert case["matrix"] > 0, case


def test_signs_cost_at_most_400_instructions_per_128(cases):
    products = [c for c in cases if c["kernel"] == "rademacher" and c["arch"] == "sm_90"]
    assert products
    for case in products:
        signs = case["block_k"] * 256 / (32 * case["num_warps"])
        # less than one operation per two signs means the generator was folded away
        assert 64 <= case["loop"] * 128 / signs <= 400, case


def test_normals_cost_at_most_48_instructions_each(cases):
    products = [c for c in cases if c["kernel"] == "normal" and c["arch"] == "sm_90"]
    assert products
    for case in products:
        entries = case["block_k"] * 64 / (32 * case["num_warps"])
        assert 16 <= case["loop"] / entries <= 48, case


def test_sketches_use_matrix_instructions(cases):
    sketches = [c for c in cases if c["kernel"] == "sketch" and c["dtype"] != "fp32"]
    assert sketches
    for case in sketches:
        assert case["matrix"] > 0, case


def test_a_flip_costs_at_most_400_instructions(cases, pytestconfig):
    for arch in ("sm_80", "sm_90") if is_full(pytestconfig) else (FEW,):
        loop = {
            c["form"]: c["loop"] for c in cases if c["kernel"] == "sketch" and c["arch"] == arch
        }
        # less than one operation per entry means the generator was folded away
        assert 64 <= loop["3x3"] - loop["3x3, no flip"] <= 400, (arch, loop)


def test_tuned_configurations_are_compiled_for_their_card(compiled):
    """What the tests above say of shipped configurations, they say of these."""
    cases = compiled["tuned"]["cases"]
    assert [c["arch"] for c in cases if c["kernel"] == "rademacher"] == ["sm_90"]
    assert [c["arch"] for c in cases if c["kernel"] == "sketch"] == ["sm_80"]
    test_sketches_use_matrix_instructions([c for c in cases if c["kernel"] == "sketch"])
    assert [c["arch"] for c in cases if c["kernel"] == "gram_product"] == list(SHARED_LIMITS)
    test_memory_fits(cases)
    test_nothing_spills(cases)


# slow: the fast lane has what fits
@pytest.mark.full
def test_what_does_not_fit_is_noticed(compiled):
    with pytest.raises(AssertionError):
        test_memory_fits(compiled["too large"]["cases"])


def test_configurations_of_no_operation_are_refused(compiled):
    message = "project_uniform.json: no operation is called 'project_uniform'"
    assert message in compiled["no operation"]["failed"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("no form", "form must be like 'one tap, channels last, 16 bits, .*, got 'two taps'"),
        ("no block", "sketch.json: block_t must be a power of two from 16 to 256"),
    ],
)
def test_configurations_of_no_sketch_are_refused(name, message, compiled):
    assert re.search(message, compiled[name]["failed"]), compiled[name]["failed"]
