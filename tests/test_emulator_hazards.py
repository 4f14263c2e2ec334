"""What the emulator rejects, each in a few lines of PTX, next to the same lines done right."""

import warnings

import numpy as np
import pytest
from emulator.errors import (
    ConflictError,
    DivergenceError,
    EmulationError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    SerializedWarning,
    UnfinishedError,
    UninitializedError,
)
from emulator.snippets import run

# threads 0 to 63; %r1 is a thread's own word of shared memory, %r2 one of the other warp
START = """
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    xor.b32 %r2, %r1, 128;
    ld.param.b64 %rd0, [p0];
    mad.wide.u32 %rd1, %r0, 4, %rd0;
"""


def rejected(body, error, match, *, size=64, **options):
    options = {"threads": 64, "shared": 1024, **options}
    with pytest.raises(error, match=match):
        run(START + body + "ret;", np.zeros(size, np.uint32), **options)


def accepted(body, **options):
    options = {"threads": 64, "shared": 1024, **options}
    data = np.zeros(64, np.uint32)
    run(START + body + "ret;", data, **options)
    return data


# --- addresses


@pytest.mark.parametrize("offset", [4, -4, 2**20 - 256])
@pytest.mark.parametrize("access", ["ld.global.b32 %r5, [%rd1+{}];", "st.global.b32 [%rd1+{}], 1;"])
def test_global_memory_outside_of_a_tensor(access, offset):
    rejected(access.format(offset), OutOfBoundsError, "bytes at")


def test_a_guard_keeps_accesses_inside():
    guarded = "setp.lt.u32 %p0, %r0, 63; @%p0 ld.global.b32 %r5, [%rd1+4];"
    accepted(guarded)
    rejected(guarded.replace("63", "64"), OutOfBoundsError, "offset 256 of a tensor of 256")


@pytest.mark.parametrize("access", ["ld.shared.b32 %r5, [%r1+772];", "st.shared.b32 [%r1+772], 1;"])
def test_shared_memory_outside_of_a_block(access):
    rejected(access, OutOfBoundsError, "of 1024 bytes of shared memory")


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.b32 %r5, [%rd1+2];",
        "st.global.v2.b32 [%rd1], {%r0, %r0};",
        "st.shared.b32 [%r1+2], 1;",
        "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};",
        "cp.async.ca.shared.global [%r1], [%rd1], 8;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r1];",
    ],
)
def test_addresses_that_are_not_aligned(access):
    # words are four bytes apart: a wider access is not aligned in every thread
    rejected(access, MisalignedError, "not aligned", size=80)


# --- shared memory


def test_shared_memory_must_be_written_before_it_is_read():
    rejected("ld.shared.b32 %r5, [%r1];", UninitializedError, "nothing was written to")
    accepted("st.shared.b32 [%r1], 1; ld.shared.b32 %r5, [%r1];")


def test_read_after_write_by_another_warp():
    body = "st.shared.b32 [%r1], %r0; {} ld.shared.b32 %r5, [%r2]; st.global.b32 [%rd1], %r5;"
    rejected(body.format(""), RaceError, "another warp wrote, with no barrier")
    assert accepted(body.format("bar.sync 0;")).tolist() == [*range(32, 64), *range(32)]
    # within a warp, lanes are in step
    accepted(body.format("").replace("%r2", "%r1"))


def test_write_after_read_by_another_warp():
    body = "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2]; {}"
    rejected(
        body.format("st.shared.b32 [%r1], 7;"), RaceError, "another warp read, with no barrier"
    )
    accepted(body.format("bar.sync 0; st.shared.b32 [%r1], 7;"))


def test_write_after_reads_by_several_warps():
    body = "st.shared.b32 [%r1], 0; bar.sync 0; ld.shared.b32 %r5, [8]; ld.shared.b32 %r5, [%r1];{}"
    body = body.replace("[8]", "[%r9]").replace("bar", "mov.b32 %r9, 8; bar")
    write = "setp.eq.u32 %p0, %r0, 2; @%p0 st.shared.b32 [%r9], 1;"
    rejected(body.format(write), RaceError, "another warp read")
    accepted(body.format("bar.sync 0;" + write))


def test_write_after_write_by_another_warp():
    body = "st.shared.b32 [%r1], %r0; {} st.shared.b32 [%r2], %r0;"
    rejected(body.format(""), RaceError, "two warps write")
    accepted(body.format("bar.sync 0;"))
    # the same value written twice is what replicated data do
    accepted("st.shared.b32 [%r1], 5; st.shared.b32 [%r2], 5;")


def test_lanes_that_write_different_values_to_one_address():
    for store in ("st.shared.b32 [%r9], {};", "st.global.b32 [%rd0], {};"):
        rejected("mov.b32 %r9, 16;" + store.format("%r0"), ConflictError, "write other values")
        accepted("mov.b32 %r9, 16;" + store.format("3"))


def test_every_block_has_its_own_shared_memory():
    body = """
        mov.u32 %r9, %ctaid.x;
        st.shared.b32 [%r1], %r9;
        bar.sync 0;
        ld.shared.b32 %r5, [%r2];
        setp.eq.u32 %p0, %r0, %r9;
        @%p0 st.global.b32 [%rd1], %r5;
    """
    assert accepted(body, blocks=64).tolist() == list(range(64))


# --- global memory


def test_global_memory_that_another_warp_or_block_wrote():
    body = "st.global.b32 [%rd1], %r0; {} xor.b32 %r5, %r0, 32; "
    body += "mad.wide.u32 %rd2, %r5, 4, %rd0; ld.global.b32 %r6, [%rd2];"
    rejected(body.format(""), RaceError, "another warp wrote, with no barrier")
    accepted(body.format("bar.sync 0;"))
    shared = "st.global.b32 [%rd1], %r0;"
    rejected(shared, RaceError, "two blocks of one launch write", blocks=2)
    by_one = "mov.u32 %r9, %ctaid.x; setp.eq.u32 %p0, %r9, 0; @%p0 st.global.b32 [%rd1], %r0;"
    rejected(by_one + "ld.global.b32 %r6, [%rd1];", RaceError, "another block", blocks=2)
    accepted(by_one, blocks=2)


# --- control flow


def test_a_barrier_that_some_threads_do_not_reach():
    guard = "setp.lt.u32 %p0, %r0, 40;"
    rejected(guard + "@%p0 bar.sync 0;", DivergenceError, "barrier that some threads")
    rejected(guard + "@%p0 bra END; bar.sync 0; END:", DivergenceError, "some threads of a block")


def test_blocks_may_part_ways():
    body = """
        mov.u32 %r9, %ctaid.x;
        mov.b32 %r10, 0;
        mov.b32 %r11, 1;
    LOOP:
        mul.lo.s32 %r11, %r11, 3;
        st.shared.b32 [%r1], %r11;
        bar.sync 0;
        ld.shared.b32 %r12, [%r2];
        bar.sync 0;
        add.s32 %r10, %r10, 1;
        setp.le.u32 %p0, %r10, %r9;
        @%p0 bra LOOP;
        setp.eq.u32 %p1, %r0, %r9;
        @%p1 st.global.b32 [%rd1], %r12;
    """
    assert accepted(body, blocks=10)[:10].tolist() == [3 ** (i + 1) for i in range(10)]


def test_registers_and_traps():
    rejected("add.s32 %r5, %r6, 1;", UninitializedError, "register %r6 was never written")
    rejected("setp.eq.u32 %p0, %r0, 9; @%p0 trap;", EmulationError, "gave up")
    accepted("setp.eq.u32 %p0, %r0, 99; @%p0 trap;")


# --- asynchronous copies

COPY = "cp.async.ca.shared.global [%r1], [%rd1], 4; cp.async.commit_group;"
WAIT = "cp.async.wait_group 0; bar.sync 0;"


def test_a_copy_is_waited_for_before_it_is_read():
    body = COPY + "{} ld.shared.b32 %r5, [%r2];"
    accepted(body.format(WAIT))
    rejected(body.format("bar.sync 0;"), UnfinishedError, "before its wait")
    rejected(body.format("cp.async.wait_group 1; bar.sync 0;"), UnfinishedError, "before its wait")
    # the wait is for a warp's own copies: others need the barrier, too
    rejected(body.format("cp.async.wait_group 0;"), RaceError, "another warp wrote")
    accepted(body.format("cp.async.wait_group 0;").replace("%r2", "%r1"))


def test_only_older_groups_are_waited_for():
    two = COPY + COPY.replace("[%r1]", "[%r1+256]") + "cp.async.wait_group 1; bar.sync 0;"
    accepted(two + "ld.shared.b32 %r5, [%r2];")
    rejected(two + "ld.shared.b32 %r5, [%r2+256];", UnfinishedError, "before its wait")


def test_the_place_of_a_copy_is_left_alone():
    rejected(COPY + "bar.sync 0; st.shared.b32 [%r1], 1;", UnfinishedError, "before its wait")
    read = "st.shared.b32 [%r1], 1; bar.sync 0; ld.shared.b32 %r5, [%r2]; {}" + COPY
    rejected(read.format(""), RaceError, "another warp read")
    accepted(read.format("bar.sync 0;"))


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing():
    body = """
        mov.b32 %r7, 0;
        mov.b64 %rd9, 8;
        cp.async.ca.shared.global [%r1], [%rd9], 4, %r7;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.b32 %r5, [%r1];
        st.global.b32 [%rd1], %r5;
    """
    assert not accepted(body).any()
    rejected(body.replace("%r7, 0", "%r7, 4"), OutOfBoundsError, "in no tensor")


# --- asynchronous products

D = ", ".join(f"%r{100 + i}" for i in range(4))
A = "%r90, %r91, %r92, %r93"
FILL = "".join(f"mov.b32 %r{i}, 0;" for i in (*range(100, 104), *range(90, 94)))
FILL += "mov.b32 %r80, 0; st.shared.b32 [%r1], %r80;"
# one core matrix of 8 x 8 after the other, not swizzled
FILL += f"mov.b64 %rd8, {128 >> 4 << 16 | 256 >> 4 << 32};"
READY = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{D}}}, {{{A}}}, %rd8, 1, 1, 1, 0;"
COMMIT, DONE = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
GROUP = {"threads": 128, "shared": 512}


def group(body):
    # every thread of 128 has a word of a tensor of 64
    return body + "and.b32 %r70, %r0, 63; mad.wide.u32 %rd1, %r70, 4, %rd0;"


def product_rejected(body, error, match):
    rejected(group(body), error, match, **GROUP)


def test_a_product_is_waited_for():
    whole = FILL + READY + PRODUCT + COMMIT
    use = "add.f32 %r5, %r100, %r101;"
    accepted(group(whole + DONE + use), **GROUP)
    product_rejected(whole + use, UnfinishedError, "used before its wait")
    product_rejected(whole + "mov.b32 %r103, 0;", UnfinishedError, "used before its wait")
    late = whole + PRODUCT + COMMIT + DONE.replace("0;", "1;") + use
    product_rejected(late, UnfinishedError, "used before its wait")


def test_what_a_product_reads_is_left_alone():
    whole = FILL + READY + PRODUCT + COMMIT
    store = "st.shared.b32 [%r1], %r80;"
    product_rejected(whole + "bar.sync 0;" + store, UnfinishedError, "a product may still read")
    # after its own wait a warp must wait for the others of its group
    product_rejected(whole + DONE + store, RaceError, "another warp read")
    accepted(group(whole + DONE + "bar.sync 0;" + store), **GROUP)


def test_registers_that_a_product_reads_are_seen_by_ptxas():
    whole = FILL + READY + PRODUCT + COMMIT + "mov.b32 %r90, 1;"
    with pytest.warns(SerializedWarning, match="may still read is written"):
        accepted(group(whole), **GROUP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accepted(group(whole.replace("mov.b32 %r90", DONE + "mov.b32 %r90")), **GROUP)


def test_a_product_reads_what_is_there():
    for missing, error, match in (
        ("fence.proxy.async.shared::cta;", RaceError, "no fence.proxy.async"),
        ("bar.sync 0;", RaceError, "no barrier since"),
        ("wgmma.fence.sync.aligned;", UnfinishedError, "after the last wgmma.fence"),
    ):
        product_rejected(FILL + READY.replace(missing, "") + PRODUCT, error, match)
    empty = FILL.replace("st.shared.b32 [%r1], %r80;", "")
    product_rejected(empty + READY + PRODUCT, UninitializedError, "nothing was written to")
    far = FILL + "add.s64 %rd8, %rd8, 64;"
    product_rejected(far + READY + PRODUCT, OutOfBoundsError, "read by a wgmma")
