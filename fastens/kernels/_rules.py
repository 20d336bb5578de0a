"""The rules on members held in registers or read in a loop, as Triton functions (arXiv 2601.11444).

A rule is a compile-time name. Reductions are in ``WIDE``: float32, or float64 for float64 scores.
"""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# Triton compiles these functions: pyright takes them for Python.

import triton
import triton.language as tl


@triton.jit
def larger(value, best):
    """The one of larger magnitude; ``best`` where they tie, and NaN wins and stays."""
    return tl.where((tl.abs(value) > tl.abs(best)) | (value != value), value, best)


@triton.jit
def smaller(value, best):
    """The smaller one; NaN wins and stays."""
    return tl.where((value < best) | (value != value), value, best)


@triton.jit
def exchange(v, A: tl.constexpr, B: tl.constexpr):
    """Put elements A < B of a tuple in order."""
    low = tl.minimum(v[A], v[B])
    high = tl.maximum(v[A], v[B])
    return v[:A] + (low,) + v[A + 1 : B] + (high,) + v[B + 1 :]  # noqa: RUF005 - not Python


@triton.jit
def median_few(v, K: tl.constexpr, PAIRS: tl.constexpr, AVERAGE: tl.constexpr):
    """The median of K values in registers, by a sorting network."""
    nan = v[0] != v[0]
    for k in tl.static_range(1, K):
        nan = nan | (v[k] != v[k])
    for p in tl.static_range(len(PAIRS) // 2):  # pyright: ignore[reportArgumentType]  # a constexpr is a tuple here
        v = exchange(v, PAIRS[2 * p], PAIRS[2 * p + 1])
    middle = v[(K - 1) // 2]
    if AVERAGE and K % 2 == 0:
        middle = 0.5 * middle + 0.5 * v[K // 2]
    return tl.where(nan, float("nan"), middle)


@triton.jit
def float_parts(x, WIDE: tl.constexpr):
    """A positive normal x as a mantissa in [1, 2) and an exponent."""
    if tl.float64 == WIDE:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits >> 52) - 1023
        mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return mantissa, exponent


@triton.jit
def power_of_two(exponent, WIDE: tl.constexpr):
    """2**exponent, within the range of normal numbers."""
    if tl.float64 == WIDE:
        power = ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def root(product, exponent, num_members, WIDE: tl.constexpr):
    """(product * 2**exponent) ** (1 / K): one logarithm for K factors; the whole part of the exponent is exact."""
    inverse = 1.0 / num_members.to(WIDE)
    whole = tl.floor(exponent.to(WIDE) * inverse).to(exponent.dtype)
    rest = (exponent - whole * num_members.to(exponent.dtype)).to(WIDE)
    fraction = tl.exp2((tl.log2(product) + rest) * inverse)
    return fraction * power_of_two(whole - 1, WIDE) * 2.0  # 2**whole alone may overflow


@triton.jit
def geometric_argument(score, base, shift, EPS: tl.constexpr):
    """S + m, m = |min| + eps, where ``base`` and ``shift`` say so without losing eps to rounding."""
    return ((score - base) + shift) + EPS


@triton.jit
def beyond(x):
    """An infinite or NaN x, else 0: what the exponent arithmetic would lose."""
    return tl.where(x < float("inf"), 0.0, x)


@triton.jit
def ordered_key(x, WIDE: tl.constexpr):
    """An unsigned integer that orders as the floats do."""
    if tl.float64 == WIDE:
        bits = x.to(tl.int64, bitcast=True)
        key = (bits ^ ((bits >> 63) | -0x8000000000000000)).to(tl.uint64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def from_ordered_key(key, WIDE: tl.constexpr):
    """The float of an ordered key."""
    if tl.float64 == WIDE:
        bits = key.to(tl.int64, bitcast=True)
        value = tl.where(bits < 0, bits ^ -0x8000000000000000, ~bits).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32, bitcast=True)
        value = tl.where(bits < 0, bits ^ -0x80000000, ~bits).to(tl.float32, bitcast=True)
    return value


def sorting_network(n: int) -> tuple[int, ...]:
    """Pairs a < b to put in order, flat: Batcher's odd-even merge sort (AFIPS 1968), as in csrc/sorting_network.h."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs += [i + j, i + j + k]
            k //= 2
        p *= 2
    return tuple(pairs)
