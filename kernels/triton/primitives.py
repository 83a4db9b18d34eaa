"""The elementary functions in Triton: branch-free fp32 arithmetic, for the compiler and the interpreter alike.

None of them is libdevice's, whose erf, tanh and log1p take more instructions per element than a kernel bound by memory can
hide, whose sine has a slow path through local memory, and which the interpreter lacks. Only a block that holds a large argument
of sin or cos takes Triton's own. The polynomials are those of `primitives.h`. All functions propagate NaN.

PRECISE is true for fp32 tensors, where every function is accurate to a few ulp. For bf16 and fp16 a relative error of 2**-17 is
negligible, and exp and log are the hardware's: 2**x of a rounded product has an error of |x| * 2**-24; that of log2 is 2**-22
and absolute, so small arguments take a short series instead. Negation is a product with -1, which the compiler folds into its
user; Triton's own `-x` is 0 - x, a separate instruction.

Only generated code imports this module, which requires Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # the default ignores a NaN


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def keep_nan(value, source):
    return tl.where(source != source, source, value)


@triton.jit
def quotient(a, b, PRECISE: tl.constexpr):
    """Return a / b, where b is one number for many a."""
    if PRECISE:
        result = a / b
    else:
        result = a * (1.0 / b)
    return result


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))  # NaN fails both comparisons


@triton.jit
def with_sign(magnitude, x):
    """Return |magnitude| with the sign of x."""
    bits = (magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def expm1_reduced(r):
    """Return exp(r) - 1 for |r| <= ln 2 / 2."""
    p = r * 0.000198458773 + 0.00139406277
    p = p * r + 0.00833338965
    p = p * r + 0.0416663624
    p = p * r + 0.166666657
    p = p * r + 0.5
    return r * r * p + r


@triton.jit
def reduce_exp(x):
    """Return r and n of x = n ln 2 + r; n is in the low bits of the second result, an int32."""
    t = x * 1.4426950216293335 + 12582912.0  # + 1.5 * 2**23: rounds to the nearest integer
    n = t - 12582912.0
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06  # the first constant has 16 bits: the product is exact
    return r, t.to(tl.int32, bitcast=True)


@triton.jit
def power_of_two(n):
    """Return 2**n of the low bits of an int32, for n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    if PRECISE:
        r, n = reduce_exp(minimum(maximum(x, -104.0), 89.0))  # pyright: ignore[reportGeneralTypeIssues]  # typed as raising
        half = ((n & 0x1FF) ^ 0x100) - 0x100  # the sign of the 9 low bits, extended
        low = half >> 1
        result = (expm1_reduced(r) + 1.0) * power_of_two(low) * power_of_two(half - low)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def expm1(x, PRECISE: tl.constexpr):
    if PRECISE:
        r, n = reduce_exp(minimum(maximum(x, -20.0), 89.0))  # pyright: ignore[reportGeneralTypeIssues]  # typed as raising
        half = power_of_two(n - 1)
        result = 2.0 * (half * expm1_reduced(r) + (half - 0.5))  # half: 2**128 overflows fp32
    else:
        series = x * ((x * 0.166666667 + 0.5) * x + 1.0)  # the next term is x**3 / 24 of it
        result = tl.where(tl.abs(x) < 0.015625, series, tl.exp(x) - 1.0)
    return result


@triton.jit
def tail(x):
    """Return sigmoid(-|x|), at most 1/2; see `tail` in `primitives.h`."""
    z = exp(tl.abs(x) * -1.0, True)
    return z / (1.0 + z)


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    if PRECISE:
        result = tl.where(x > 0.0, 1.0 - tail(x), tail(x))
    else:
        result = 1.0 / (1.0 + exp(x * -1.0, False))
    return result


@triton.jit
def complement(s, u, PRECISE: tl.constexpr):
    """Return 1 - s with s = sigmoid(u), whose exp the compiler reuses."""
    if PRECISE:
        result = tl.where(u > 0.0, tail(u), 1.0 - s)
    else:
        result = tl.where(u > 0.0, exp(u * -1.0, False) * s, 1.0 - s)
    return result


@triton.jit
def mul_sigmoid(a, b, PRECISE: tl.constexpr):
    """Return a * sigmoid(b)."""
    if PRECISE:
        result = a * sigmoid(b, True)
    else:
        result = a / (1.0 + exp(b * -1.0, False))
    return result


@triton.jit
def log1p_reduced(f):
    """Return (log(1 + f) - f) / f**2 for 1 + f between sqrt(1/2) and sqrt(2)."""
    p = f * 0.0672498196 - 0.11676006
    p = p * f + 0.119009674
    p = p * f - 0.124073468
    p = p * f + 0.142176807
    p = p * f - 0.166676879
    p = p * f + 0.200022206
    p = p * f - 0.250000268
    p = p * f + 0.333333105
    return p * f - 0.5


@triton.jit
def log_of(x, correction):
    """Return log(x) + correction / x, for normal x > 0."""
    u = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # mantissas from sqrt(1/2) to sqrt(2)
    n = (u >> 23).to(tl.float32)
    f = ((u & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    low = f * f * log1p_reduced(f) + (n * 1.428606765330187e-06 + correction / x)
    return n * 0.693145751953125 + (f + low)


@triton.jit
def log_edges(x, y):
    """Return log(x) where x is 0, negative, infinite or NaN, else y."""
    edge = tl.where(x == 0.0, float("-inf"), tl.where(x < 0.0, float("nan"), x))
    return tl.where((x > 0.0) & (x < float("inf")), y, edge)


@triton.jit
def log(x, PRECISE: tl.constexpr):
    if PRECISE:
        small = x < 1.1754943508222875e-38
        y = log_of(tl.where(small, x * 33554432.0, x), 0.0)
        result = log_edges(x, tl.where(small, y - 17.32867956161499, y))  # 25 ln 2
    else:
        result = tl.log2(x) * 0.6931471805599453
    return result


@triton.jit
def log1p(x):
    u = 1.0 + x
    return tl.where(tl.abs(x) < 5.960464477539063e-08, x, log_edges(u, log_of(u, x - (u - 1.0))))


@triton.jit
def softplus(x, PRECISE: tl.constexpr):
    z = exp(tl.abs(x) * -1.0, PRECISE)
    if PRECISE:
        large = z > 0.41421356  # 1 + z lies between 1 and 2: its logarithm needs no exponent
        f = tl.where(large, z * 0.5 - 0.5, z)
        y = f * f * log1p_reduced(f) + f + tl.where(large, 0.6931471805599453, 0.0)
    else:
        p = z * 0.0141409907 - 0.0664017019  # log1p(z) / z for z <= 1
        p = p * z + 0.149223754
        p = p * z - 0.235038535
        p = p * z + 0.331094471
        p = p * z - 0.499869654
        p = p * z + 0.999998731
        y = p * z
    return maximum(x, 0.0) + y


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    s = x * x
    if PRECISE:
        p = s * -0.000358410674 + 0.002301272
        p = p * s - 0.00794606376
        p = p * s + 0.0214866996
        p = p * s - 0.0538798496
        p = p * s + 0.133323461
        p = p * s - 0.333332956
        large = with_sign(1.0 - 2.0 * tail(2.0 * x), x)
        result = tl.where(s < 1.0, s * x * p + x, large)
    else:
        series = x * (s * -0.333333333 + 1.0)  # the next term is 2 / 15 x**4 of it
        result = tl.where(tl.abs(x) < 0.03125, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
    return result


@triton.jit
def sech2(t, u, PRECISE: tl.constexpr):
    """Return 1 - t * t with t = tanh(u)."""
    if PRECISE:
        c = tail(2.0 * u)
        result = tl.where(t * t < 0.25, 1.0 - t * t, 4.0 * c * (1.0 - c))
    else:
        result = 1.0 - t * t
    return result


@triton.jit
def erf(x, PRECISE: tl.constexpr):
    t = minimum(tl.abs(x), 4.0)  # erf(4) rounds to 1
    if PRECISE:
        q = t * -9.25634868e-06 + 0.000117641976  # -log(1 - erf(t)) / t
        q = q * t - 0.000632839219
        q = q * t + 0.00166703155
        q = q * t - 0.000160399795
        q = q * t - 0.0191530623
        q = q * t + 0.102777831
        q = q * t + 0.636619389
        q = q * t + 1.12837923
        result = with_sign(expm1(q * t * -1.0, True), x)
    else:
        q = t * 0.00207670848 - 0.0206537917
        q = q * t + 0.103235126
        q = q * t + 0.636570096
        q = q * t + 1.12837994
        series = x * (x * x * -0.376126389 + 1.12837917)  # the next term is x**4 / 10 of it
        result = tl.where(t < 0.0625, series, with_sign(1.0 - tl.exp(q * t * -1.0), x))
    return result


@triton.jit
def normal_cdf(x, PRECISE: tl.constexpr):
    t = minimum(tl.abs(x), 5.75)
    if PRECISE:
        q = t * 1.68024403e-08 - 5.15258307e-07  # -log(2 normal_cdf(-t)) / t
        q = q * t + 6.76684795e-06
        q = q * t - 4.83074582e-05
        q = q * t + 0.000178474875
        q = q * t + 2.9952882e-05
        q = q * t - 0.00484908326
        q = q * t + 0.0363702998
        q = q * t + 0.318301618
        q = q * t + 0.79788518
        tail_ = 0.5 * exp(q * t * -1.0, True)
    else:
        q = t * -1.45180911e-06 + 5.45330586e-05  # (log2(normal_cdf(-t)) + 1) / t
        q = q * t - 0.000880064908
        q = q * t + 0.00833231770
        q = q * t - 0.0536528155
        q = q * t - 0.458715439
        q = q * t - 1.15117407
        tail_ = tl.exp2(q * t - 1.0)
    kept = tl.where(t < 5.7, tail_, tail_ * 0.0)  # negligible beyond it; propagates NaN
    return tl.where(x > 0.0, 1.0 - kept, kept)


@triton.jit
def sqrt(x, PRECISE: tl.constexpr):
    if PRECISE:
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)
    return result


@triton.jit
def atan(x, PRECISE: tl.constexpr):
    a = tl.abs(x)
    z = tl.where(a > 1.0, 1.0 / a, a)
    s = z * z
    if PRECISE:
        p = s * 0.00111377181 - 0.00731787179
        p = p * s + 0.0225396883
        p = p * s - 0.0446897298
        p = p * s + 0.0674158186
        p = p * s - 0.0881108493
        p = p * s + 0.110582218
        p = p * s - 0.142798334
        p = p * s + 0.19999671
        p = p * s - 0.333333284
    else:
        p = s * -0.0139550939 + 0.0587702394
        p = p * s - 0.122515
        p = p * s + 0.196183085
        p = p * s - 0.333088994
    y = s * z * p + z
    return with_sign(tl.where(a > 1.0, 1.5707963705062866 - y - 4.371138828673793e-08, y), x)


@triton.jit
def circle(x, quarters):
    """Return sin(x + quarters * pi / 2) for |x| up to 100,000."""
    t = x * 0.6366197466850281 + 12582912.0
    whole = t - 12582912.0
    n = t.to(tl.int32, bitcast=True) + quarters
    rest = (x - whole * 1.5703125) - whole * 0.0004837512969970703
    r = rest - whole * 7.549790126404332e-08
    low = tl.where(tl.abs(r) > 0.01, (rest - r) - whole * 7.549790126404332e-08, 0.0)  # what rounding r has lost
    s = r * r
    sine = (s * r * ((s * -0.00019515217 + 0.0083321603) * s - 0.166666552) + low) + r
    near_1 = 1.0 - 0.5 * s
    lost = (1.0 - near_1) - 0.5 * s
    cosine = ((s * s * ((s * 2.44383773e-05 - 0.00138873665) * s + 0.0416666456) - r * low) + lost) + near_1
    y = tl.where((n & 1) != 0, cosine, sine)
    return tl.where((n & 2) != 0, y * -1.0, y)


@triton.jit
def is_far(x):
    """Return whether `circle` is inaccurate for any element of a block, or for a single number."""
    far = tl.abs(x) > 100000.0
    if x.type.is_block():
        far = tl.max(far.to(tl.int32)) > 0
    return far


@triton.jit
def sin(x):
    y = circle(x, 0)
    if is_far(x):
        y = tl.where(tl.abs(x) > 100000.0, tl.sin(x), y)
    return y


@triton.jit
def cos(x):
    y = circle(x, 1)
    if is_far(x):
        y = tl.where(tl.abs(x) > 100000.0, tl.cos(x), y)
    return y
