"""The counter-based random stream as Triton device functions, as `dense.reference` defines it."""

import triton
import triton.language as tl


@triton.jit
def philox_4x32(c0, c1, c2, c3, key_low, key_high):  # type: ignore[no-untyped-def]
    """Four uint32 words of Philox-4x32-10 per uint32 counter; the key is two integer scalars."""
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        # 32x32-bit products in 64 bits: one wide multiply each
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b):  # type: ignore[no-untyped-def]
    """Two float32 standard normals per pair of uint32 words, within 1e-6 of exact arithmetic.

    The library's ``log``, ``cos`` and ``sin`` are either not accurate enough or branch into local
    memory; integer words make both range reductions exact, and short minimax polynomials do the
    rest.
    """
    # ln((a + 1) / 2**32) = exponent * ln 2 + ln(1 + f), |f| < 0.42; above √½ the exponent is 0 and
    # f = (a + 1 - 2**32) / 2**32 keeps the digits that a float of a + 1 would lose
    value = (a + 1).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    near_one = a >= 0xB504F334
    distance = (0xFFFFFFFF - a).to(tl.int32, bitcast=True).to(tl.float32)
    f = tl.where(near_one, distance * (-(2.0**-32)), mantissa - 1.0)
    exponent = tl.where(near_one, 0, exponent - 32).to(tl.float32)
    # (ln(1 + f) / f - 1) / f, error below 3.2e-8
    q = -0.076736415 * f + 0.127226728
    q = q * f - 0.131275557
    q = q * f + 0.14204856
    q = q * f - 0.166266456
    q = q * f + 0.200012345
    q = q * f - 0.250007812
    q = q * f + 0.3333333
    q = q * f - 0.499999976
    radius = tl.sqrt(exponent * -1.3862943611198906 - 2.0 * (q * f + 1.0) * f)

    # b / 2**32 turns: the nearest quarter turn, and t in [-1/2, 1/2] quarter turns from there
    quarter = (b + 0x20000000) >> 30
    t = (b - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-30)
    u = t * t
    # sin(π t / 2) / t and cos(π t / 2), errors below 5e-9 and 2.8e-8
    s = ((-0.0046021492 * u + 0.0796802176) * u - 0.6459634777) * u + 1.570796322
    c = ((-0.0204081584 * u + 0.2535985713) * u - 1.2336970074) * u + 1.0
    s = s * t * radius
    c = c * radius
    is_odd = (quarter & 1) != 0
    x = tl.where(is_odd, s, c)
    y = tl.where(is_odd, c, s)
    x = (x.to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    y = (y.to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
    return x, y
