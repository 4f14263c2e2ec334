"""Single instructions of the emulator against their definition, in Python's exact numbers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator.decode import decode
from emulator.errors import UnknownInstructionError
from emulator.machine import Machine
from emulator.memory import GlobalMemory
from emulator.ptx import parse
from emulator.snippets import per_lane, run

RANDOM = np.random.default_rng(7)


def words(count, bits=32, signed=False):
    """Random words, and those at the ends of the type."""
    edges = [0, 1, 2, 31, 32, 33, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
    numbers = RANDOM.integers(0, 2**bits, count, dtype=np.uint64)
    numbers[: len(edges)] = edges
    RANDOM.shuffle(numbers)
    return numbers.astype(f"u{bits // 8}").view(f"{'i' if signed else 'u'}{bits // 8}")


def wrapped(value, bits):
    return value & ((1 << bits) - 1)


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


INTEGERS = {
    "add.{t}": lambda a, b: a + b,
    "sub.{t}": lambda a, b: a - b,
    "mul.lo.{t}": lambda a, b: a * b,
    "min.{t}": min,
    "max.{t}": max,
    "div.{t}": truncated,
    "rem.{t}": lambda a, b: a - truncated(a, b) * b,
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic(name, kind):
    bits = int(kind[1:])
    a, b = words(96, bits, kind[0] == "s"), words(96, bits, kind[0] == "s")
    if name[:3] in ("div", "rem"):
        # a quotient that overflows, and one of zero, are not defined
        b[(b == 0) | (b == -1 if kind[0] == "s" else False)] = 3
    got = per_lane(f"{name.format(t=kind)} %out, %in0, %in1;", a, b, result=f"u{bits // 8}")
    expected = [wrapped(INTEGERS[name](int(x), int(y)), bits) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u16"])
def test_wide_and_high_products(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b = words(96, bits, signed), words(96, bits, signed)
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    wide = per_lane(f"mul.wide.{kind} %out, %in0, %in1;", a, b, result=f"u{bits // 4}")
    assert wide.tolist() == [wrapped(p, 2 * bits) for p in products]
    high = per_lane(f"mul.hi.{kind} %out, %in0, %in1;", a, b, result=f"u{bits // 8}")
    assert high.tolist() == [wrapped(p >> bits, bits) for p in products]
    c = words(96, 2 * bits, signed)
    sums = per_lane(f"mad.wide.{kind} %out, %in0, %in1, %in2;", a, b, c, result=f"u{bits // 4}")
    assert sums.tolist() == [
        wrapped(p + int(z), 2 * bits) for p, z in zip(products, c, strict=True)
    ]


def test_mad_of_low_halves():
    a, b, c = words(96, 64), words(96, 64), words(96, 64)
    got = per_lane("mad.lo.s64 %out, %in0, %in1, %in2;", a, b, c, result="u8")
    expected = [wrapped(int(x) * int(y) + int(z), 64) for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == expected


SHIFTS = {
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "shr.s32": lambda a, n: a >> min(n, 31),
    "shl.b64": lambda a, n: a << n,
    "shr.s64": lambda a, n: a >> min(n, 63),
    "shr.u16": lambda a, n: a >> n,
}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_beyond_the_width_are_clamped(name):
    bits = int(name[5:])
    a = words(96, bits, "s" in name[3:])
    by = RANDOM.integers(0, 80, 96).astype(np.uint32)
    got = per_lane(f"{name} %out, %in0, %in1;", a, by, result=f"u{bits // 8}")
    shift = SHIFTS[name]
    assert got.tolist() == [
        wrapped(shift(int(x), int(n)), bits) for x, n in zip(a, by, strict=True)
    ]
    fixed = per_lane(f"{name} %out, %in0, 5;", a, result=f"u{bits // 8}")
    assert fixed.tolist() == [wrapped(shift(int(x), 5), bits) for x in a]


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(direction, mode):
    low, high = words(96), words(96)
    by = RANDOM.integers(0, 70, 96).astype(np.uint32)
    got = per_lane(
        f"shf.{direction}.{mode}.b32 %out, %in0, %in1, %in2;", low, high, by, result="u4"
    )
    for x, y, n, z in zip(low, high, by, got, strict=True):
        count = int(n) % 32 if mode == "wrap" else min(int(n), 32)
        both = int(y) << 32 | int(x)
        expected = both << count >> 32 if direction == "l" else both >> count
        assert int(z) == wrapped(expected, 32)


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic(name):
    a, b = words(64, 64), words(64, 64)
    function = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[name]
    got = per_lane(f"{name}.b64 %out, %in0, %in1;", a, b, result="u8")
    assert got.tolist() == [function(int(x), int(y)) for x, y in zip(a, b, strict=True)]


def test_bits_of_words():
    a = words(64)
    text = [f"{int(x):032b}" for x in a]
    assert per_lane("popc.b32 %out, %in0;", a, result="u4").tolist() == [t.count("1") for t in text]
    zeros = [len(t) - len(t.lstrip("0")) for t in text]
    assert per_lane("clz.b32 %out, %in0;", a, result="u4").tolist() == zeros
    reverse = [int(t[::-1], 2) for t in text]
    assert per_lane("brev.b32 %out, %in0;", a, result="u4").tolist() == reverse
    assert per_lane("not.b32 %out, %in0;", a, result="u4").tolist() == [
        2**32 - 1 - int(x) for x in a
    ]
    negative = [wrapped(-int(x), 32) for x in a]
    assert per_lane("neg.s32 %out, %in0;", a, result="u4").tolist() == negative


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_fields(kind):
    a = words(96, 32, kind == "s32")
    start = RANDOM.integers(0, 40, 96).astype(np.uint32)
    length = RANDOM.integers(0, 40, 96).astype(np.uint32)
    got = per_lane(f"bfe.{kind} %out, %in0, %in1, %in2;", a, start, length, result="u4")
    for x, first, count, y in zip(a, start, length, got, strict=True):
        # bit by bit, as the definition has it
        bit = lambda place, x=x: int(x) >> place & 1
        first, count = int(first), int(count)
        last = min(first + count - 1, 31)
        sign = 0 if kind == "u32" or count == 0 else bit(last)
        expected = 0
        for place in range(32):
            inside = place < count and first + place <= 31
            expected |= (bit(first + place) if inside else sign) << place
        assert int(y) == expected, (x, first, count)


def test_bytes_are_chosen_by_digits():
    a, b, chosen = words(64), words(64), RANDOM.integers(0, 2**16, 64).astype(np.uint32)
    got = per_lane("prmt.b32 %out, %in0, %in1, %in2;", a, b, chosen, result="u4")
    for x, y, digits, z in zip(a, b, chosen, got, strict=True):
        pool = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        picked = []
        for place in range(4):
            digit = int(digits) >> (4 * place) & 15
            byte = pool[digit & 7]
            picked.append((255 if byte & 128 else 0) if digit & 8 else byte)
        assert int(z).to_bytes(4, "little") == bytes(picked)


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x1D, 0xFF])
def test_any_function_of_three_bits(table):
    a, b, c = words(64), words(64), words(64)
    got = per_lane(f"lop3.b32 %out, %in0, %in1, %in2, {table};", a, b, c, result="u4")
    for x, y, z, w in zip(a, b, c, got, strict=True):
        expected = 0
        for place in range(32):
            row = (int(x) >> place & 1) * 4 + (int(y) >> place & 1) * 2 + (int(z) >> place & 1)
            expected |= (table >> row & 1) << place
        assert int(w) == expected


def test_moves_choices_and_halves():
    a, b = words(64), words(64)
    got = per_lane(
        "setp.lt.u32 %p0, %in0, %in1; selp.b32 %out, %in0, %in1, %p0;", a, b, result="u4"
    )
    assert got.tolist() == np.minimum(a, b).tolist()
    swapped = per_lane("mov.b32 {%rs0, %rs1}, %in0; mov.b32 %out, {%rs1, %rs0};", a, result="u4")
    assert swapped.tolist() == [int(x) >> 16 | wrapped(int(x) << 16, 32) for x in a]
    kept = per_lane(
        "setp.lt.u32 %p0, %in0, %in1; mov.b32 %out, 7; @!%p0 mov.b32 %out, %in0;", a, b, result="u4"
    )
    assert kept.tolist() == np.where(a < b, 7, a).tolist()


# --- floating point


def floats(count=128):
    bits = RANDOM.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, 65504, 65519, 65520],
        np.float32,
    )
    values = bits.view(np.float32)
    values[: len(special)] = special
    RANDOM.shuffle(values)
    return values


def same(got, expected):
    """Equal bits; any NaN is as good as another."""
    both = np.isnan(got) & np.isnan(expected)
    bits = f"u{got.itemsize}"
    return bool((both | (got.view(bits) == expected.view(bits))).all())


def test_fused_multiply_add_rounds_once():
    a, b = (RANDOM.standard_normal(512).astype(np.float32) for _ in range(2))
    # nearly cancels the product: only its exact low half is left
    c = (-(a.astype(np.float64) * b)).astype(np.float32)
    got = per_lane("fma.rn.f32 %out, %in0, %in1, %in2;", a, b, c, result="f4")
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == [float(np.float32(float(e))) for e in exact]


def test_minimum_and_maximum_take_the_number_of_a_number_and_a_nan():
    a, b = floats(), floats()
    assert same(per_lane("min.f32 %out, %in0, %in1;", a, b, result="f4"), np.fmin(a, b))
    assert same(per_lane("max.NaN.f32 %out, %in0, %in1;", a, b, result="f4"), np.maximum(a, b))


def test_flushing_takes_subnormal_numbers_as_zero():
    tiny = np.array([1e-40, -1e-40, 1.5, 1e-38], np.float32)
    got = per_lane("mul.ftz.f32 %out, %in0, 0f3F800000;", tiny, result="f4")
    assert same(got, np.array([0.0, -0.0, 1.5, 0.0], np.float32))
    kept = per_lane("mul.f32 %out, %in0, 0f3F800000;", tiny, result="f4")
    assert same(kept, tiny)


@pytest.mark.parametrize(
    "name, holds",
    [
        ("lt", lambda a, b: a < b),
        ("ne", lambda a, b: a < b or a > b),
        ("neu", lambda a, b: a != b),
        ("geu", lambda a, b: not a < b),
        ("nan", lambda a, b: a != a or b != b),
        ("num", lambda a, b: a == a and b == b),
        ("equ", lambda a, b: not (a < b or a > b)),
    ],
)
def test_comparisons_with_nan(name, holds):
    a, b = floats(), floats()
    b[::3] = a[::3]
    got = per_lane(f"setp.{name}.f32 %p0, %in0, %in1; selp.b32 %out, 1, 0, %p0;", a, b, result="u4")
    expected = [holds(float(x), float(y)) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == expected


def test_comparisons_are_combined():
    a, b = words(64), words(64)
    got = per_lane(
        "setp.gt.u32 %p1, %in1, 1000; setp.lt.and.u32 %p0|%p2, %in0, %in1, %p1;"
        "selp.b32 %r1, 1, 0, %p0; selp.b32 %r2, 2, 0, %p2; or.b32 %out, %r1, %r2;",
        a,
        b,
        result="u4",
    )
    assert got.tolist() == np.where(b > 1000, np.where(a < b, 1, 2), 0).tolist()


def test_narrow_numbers_are_rounded_as_torch_rounds():
    x = floats(512)
    bfloat = torch.from_numpy(x.copy()).bfloat16()
    got = per_lane("cvt.rn.bf16.f32 %out, %in0;", x, result="u2")
    assert same(
        torch.from_numpy(got.view(np.int16).copy()).view(torch.bfloat16).float().numpy(),
        bfloat.float().numpy(),
    )
    half = per_lane("cvt.rn.f16.f32 %out, %in0;", x, result="f2")
    with np.errstate(over="ignore"):
        assert same(half, x.astype(np.float16))
    widened = per_lane("cvt.f32.f16 %out, %in0;", half, result="f4")
    assert same(widened, half.astype(np.float32))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_two_numbers_in_a_word(kind):
    x, y = (RANDOM.standard_normal(64).astype(np.float32) for _ in range(2))
    got = per_lane(f"cvt.rn.{kind}x2.f32 %out, %in0, %in1;", x, y, result="u4")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    pairs = torch.from_numpy(got.view(np.int16).copy()).view(dtype).reshape(-1, 2)
    assert torch.equal(pairs[:, 1], torch.from_numpy(x).to(dtype))
    assert torch.equal(pairs[:, 0], torch.from_numpy(y).to(dtype))


def test_tf32_keeps_ten_bits_and_rounds_ties_away():
    x = RANDOM.standard_normal(256).astype(np.float32)
    x[:2] = 1 + 2.0**-11, -1 - 2.0**-11
    got = per_lane("cvt.rna.tf32.f32 %out, %in0;", x, result="f4")
    for value, rounded in zip(x, got, strict=True):
        unit = Fraction(2) ** (int(np.floor(np.log2(abs(float(value))))) - 10)
        exact = Fraction(float(value)) / unit
        whole = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
        assert Fraction(float(rounded)) == whole * unit


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_whole_numbers_saturate(mode):
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.25, -2.75, 3e9, -3e9, 1e20, np.nan, np.inf], np.float32)
    got = per_lane(f"cvt.{mode}.s32.f32 %out, %in0;", x, result="i4")
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    for value, whole in zip(x, got, strict=True):
        number = 0 if np.isnan(value) else min(max(function(float(value)), -(2**31)), 2**31 - 1)
        assert int(whole) == number


def test_integers_change_their_width():
    a = words(64)
    signed = a.view(np.int32)
    assert per_lane("cvt.s64.s32 %out, %in0;", a, result="i8").tolist() == signed.tolist()
    assert per_lane("cvt.u64.u32 %out, %in0;", a, result="u8").tolist() == a.tolist()
    wide = words(64, 64)
    low = [wrapped(int(x), 32) for x in wide]
    assert per_lane("cvt.u32.u64 %out, %in0;", wide, result="u4").tolist() == low
    byte = per_lane("cvt.s32.s8 %out, %in0;", a, result="i4")
    assert byte.tolist() == a.astype(np.uint8).view(np.int8).tolist()
    assert same(per_lane("cvt.rn.f32.s32 %out, %in0;", a, result="f4"), signed.astype(np.float32))


@pytest.mark.parametrize(
    "name, function",
    [
        ("sqrt.approx.ftz", np.sqrt),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("ex2.approx.ftz", np.exp2),
        ("lg2.approx", np.log2),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("rcp.rn", lambda x: 1 / x),
    ],
)
def test_functions(name, function):
    x = np.abs(RANDOM.standard_normal(64)).astype(np.float32) + np.float32(0.01)
    got = per_lane(f"{name}.f32 %out, %in0;", x, result="f4")
    assert np.allclose(got, function(x.astype(np.float64)), rtol=1e-7)


# --- lanes of a warp


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode, width):
    a = words(64)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for by in (0, 1, 5, 16, 31):
        got = per_lane(f"shfl.sync.{mode}.b32 %out, %in0, {by}, {clamp}, -1;", a, result="u4")
        for lane in range(64):
            own = lane % 32
            first = own // width * width
            other = {"bfly": own ^ by, "up": own - by, "down": own + by, "idx": first + by % width}
            place = other[mode]
            # a butterfly may reach into an earlier segment, never beyond its own
            if mode in ("up", "down") and not first <= place < first + width:
                place = own
            if mode == "bfly" and place >= first + width:
                place = own
            assert int(got[lane]) == int(a[lane // 32 * 32 + place]), (lane, by)


# --- what is not known is refused by name


@pytest.mark.parametrize(
    "line",
    [
        "vote.sync.ballot.b32 %r1, %p0, -1;",
        "add.sat.s32 %r1, %r1, %r1;",
        "cvt.rz.f16.f32 %rs1, %r1;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;",
        "bar.sync 1, 64;",
        "atom.global.add.f32 %r1, [%rd1], %r2;",
        "ld.local.b32 %r1, [%rd1];",
    ],
)
def test_an_unknown_instruction_is_an_error_with_its_name(line):
    with pytest.raises(UnknownInstructionError, match=line.split()[0].split(".")[0]):
        run(line)


# --- programs that were edited

LOOP = """
.visible .entry snippet(.param .u64 p0)
.reqntid 32
{
    .reg .pred %p<4>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    mov.u32 %r0, %tid.x;
    ld.param.b64 %rd0, [p0];
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
$again:
    add.s32 %r1, %r1, %r0;

    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p0, %r2, 5;
    @%p0 bra $again;
    st.global.b32 [%rd1], %r1;
    ret;
}
"""


@pytest.mark.parametrize(
    "old, new, expected",
    [
        # other numbers of instructions before a branch and its target; other constants
        ("%r1, %r0;\n\n", "%r1, %r0;\n add.s32 %r1, %r1, 7;\n", lambda t: 5 * (t + 7)),
        ("    add.s32 %r1, %r1, %r0;", "", lambda t: 0 * t),
        ("%r2, 5", "%r2, 9", lambda t: 9 * t),
        ("mov.b32 %r1, 0;", "mov.b32 %r1, 0; mov.b32 %r1, 3;", lambda t: 5 * t + 3),
    ],
)
def test_an_edited_program_is_what_it_says(old, new, expected):
    assert LOOP.count(old) == 1
    original = decode(parse(LOOP))
    lanes = np.arange(32)
    for code, result in (
        (decode(parse(LOOP.replace(old, new)), like=original), expected(lanes)),
        (original, 5 * lanes),
    ):
        memory = np.zeros(32, np.uint32)
        machine = Machine(
            code, GlobalMemory({1 << 20: memory.view(np.uint8)}), [1 << 20], 0, (1, 1, 1)
        )
        machine.run()
        assert np.array_equal(memory, result)
