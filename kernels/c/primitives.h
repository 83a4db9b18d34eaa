// The elementary functions in 32-bit arithmetic, as straight-line code that a compiler can vectorise: no branch, no call,
// no table (but for sin and cos of large numbers). Polynomials are minimax fits (relative error of the fit below 2^-27); tests hold every function to its error in ulp.
// All functions propagate NaN, so flags such as -ffinite-math-only must never be set.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif

typedef float f32;
typedef uint16_t bf16;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef double D __attribute__((vector_size(8 * LANES)));

#define PRAGMA(text) _Pragma(#text)
#ifdef _OPENMP
#define PARALLEL_FOR(work) PRAGMA(omp parallel for schedule(static) if ((work) > 1 << 15))
#else
#define PARALLEL_FOR(work)
#endif

// Tiles of a row, in an order that any number of threads can share.
#define TILE_WIDTH 4096

#define INLINE static inline __attribute__((always_inline))

INLINE V number(float x) { return x - (V){}; }
INLINE V k_select(I condition, V a, V b) { return (V)(((I)a & condition) | ((I)b & ~condition)); }
INLINE int any_lane(I condition) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined __AVX__
    return _mm256_movemask_ps((__m256)condition) != 0;
#else
    return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}
INLINE V copysign_(V a, V b) { return (V)(((I)a & 0x7fffffff) | ((I)b & (I)(number(-0.0f)))); }

INLINE V load_f32(const f32 *p) {
    V x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_f32(f32 *p, V x) { memcpy(p, &x, sizeof x); }
INLINE void add_f32(f32 *p, V x) { store_f32(p, load_f32(p) + x); }
INLINE V load_bf16(const bf16 *p) {
#ifdef __AVX512F__
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#endif
    H h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, U) << 16);
}
INLINE void store_bf16(bf16 *p, V x) {  // to the nearest, ties to even; propagates NaN
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
#else
    const U u = (U)x, rounded = u + 0x7fff + ((u >> 16) & 1);
    const H h = __builtin_convertvector((U)k_select(x != x, (V)(u | 0x400000), (V)rounded) >> 16, H);
#endif
    memcpy(p, &h, sizeof h);
}
// The first n <= LANES elements, beyond which memory may be unmapped: loads give 0 there, and nothing is stored.
#define PARTS(T)                                                    \
    INLINE V load_part_##T(const T *p, int64_t n) {                 \
        if (n == LANES) return load_##T(p);                         \
        T part[LANES] = {0};                                        \
        memcpy(part, p, n * sizeof(T));                             \
        return load_##T(part);                                      \
    }                                                               \
    INLINE void store_part_##T(T *p, V x, int64_t n) {              \
        T part[LANES];                                              \
        store_##T(n == LANES ? p : part, x);                        \
        if (n < LANES) memcpy(p, part, n * sizeof(T));              \
    }
PARTS(f32)
PARTS(bf16)
INLINE I lanes_below(int64_t n) {
    I lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < (int32_t)n;
}
INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }
INLINE float largest(V x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = larger(most, x[i]);
    return most;
}
INLINE float sum(V x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
// A sum with its rounding errors (Knuth's TwoSum): the thousands of terms of a tile may cancel, but their errors would not.
typedef struct {
    V high, low;
} Sum;
INLINE void accumulate_f32(Sum *s, V x) {
    const V high = s->high + x, added = high - s->high;
    s->low += (s->high - (high - added)) + (x - added);
    s->high = high;
}
INLINE void accumulate_bf16(Sum *s, V x) { s->high += x; }  // inputs of 8 bits need no compensation
INLINE double whole_of(Sum s) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += (double)s.high[i] + s.low[i];
    return total;
}

// The largest element and the first column that has it, by lanes and of all: a NaN is larger than any number.
typedef struct {
    V value, column;
} Lanes;
typedef struct {
    float value, column;
} Top;
INLINE V numbers_from(int64_t first) {
    V lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return number(first) + lane;
}
INLINE V square(V x) { return x * x; }
INLINE Lanes lowest(void) { return (Lanes){number(-__builtin_inff()), number(0)}; }
INLINE void keep_top(Lanes *top, V value, V column) {
    const I better = ~(value <= top->value) & (top->value == top->value);
    *top = (Lanes){k_select(better, value, top->value), k_select(better, column, top->column)};
}
static inline void merge_top(Top *top, Lanes lanes) {
    for (int i = 0; i < LANES; i++) {
        const float value = lanes.value[i], column = lanes.column[i];
        const int better = !(value <= top->value) && top->value == top->value;
        if (better || (value == top->value && column < top->column)) *top = (Top){value, column};
    }
}

static inline void add_up(float *total, const float *partial, int64_t size, int64_t blocks, int64_t space) {
    for (int64_t i = 0; i < size; i++) {
        double s = 0;
        for (int64_t block = 0; block < blocks; block++) s += partial[block * space + i];
        total[i] = s;
    }
}

static inline void keep_largest(float *total, const float *partial, int64_t size, int64_t blocks, int64_t space) {
    for (int64_t i = 0; i < size; i++) {
        total[i] = partial[i];
        for (int64_t block = 1; block < blocks; block++) total[i] = larger(total[i], partial[block * space + i]);
    }
}

INLINE V k_max(V a, V b) { return k_select((a > b) | (a != a), a, b); }
INLINE V k_min(V a, V b) { return k_select((a < b) | (a != a), a, b); }
INLINE V k_keep_nan(V value, V source) { return k_select(source != source, source, value); }
INLINE V k_abs(V x) { return (V)((I)x & 0x7fffffff); }
INLINE V k_sign(V x) { return k_select(x > 0.0f, number(1.0f), k_select(x < 0.0f, number(-1.0f), x)); }
INLINE V k_sqrt(V x) {
#ifdef __AVX512F__
    return (V)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
#define ROUND 12582912.0f
INLINE V reduce_exp(V x, V *n) {
    *n = (x * 0x1.715476p+0f + ROUND) - ROUND;
    return (x - *n * 0x1.62e4p-1f) - *n * 0x1.7f7d1cp-20f;
}
INLINE V expm1_reduced(V r) {
    V p = number(0.000198458773f);
    p = p * r + 0.00139406277f;
    p = p * r + 0.00833338965f;
    p = p * r + 0.0416663624f;
    p = p * r + 0.166666657f;
    p = p * r + 0.5f;
    return r * r * p + r;
}
INLINE V scale(V x, V n) {  // x * 2^n, for n from -252 to 254
#ifdef __AVX512F__
    return (V)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    const I whole = __builtin_convertvector(n, I), half = whole >> 1;
    return x * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
#endif
}
INLINE V bounded(V x, float low, float high) {  // propagates NaN
#ifdef __AVX512F__
    return (V)_mm512_max_ps((__m512)number(low), _mm512_min_ps((__m512)number(high), (__m512)x));
#else
    return k_select(x > high, number(high), k_select(x < low, number(low), x));
#endif
}
INLINE V at_most(V x, float high) {  // propagates NaN
#ifdef __AVX512F__
    return (V)_mm512_min_ps((__m512)number(high), (__m512)x);
#else
    return k_select(x > high, number(high), x);
#endif
}

INLINE V k_exp(V x) {
    V n;
    const V p = expm1_reduced(reduce_exp(bounded(x, -104.0f, 89.0f), &n)) + 1.0f;
    return scale(p, n);
}
INLINE V k_expm1(V x) {
    V n;
    const V p = expm1_reduced(reduce_exp(bounded(x, -20.0f, 89.0f), &n));
    const V half = scale(number(0.5f), n);
    return 2.0f * (half * p + (half - 0.5f));
}
// sigmoid(-|x|), at most 1/2. For a positive x sigmoid is 1 minus this, rounded below 1, where numbers lie twice as dense as above 1:
// there 1 / (1 + exp(-x)) rounds its divisor, which was most of the error of silu and gelu_tanh.
INLINE V tail(V x) {
    const V z = k_exp(-k_abs(x));
    return z / (1.0f + z);
}
INLINE V k_sigmoid(V x) { return k_select(x > 0.0f, 1.0f - tail(x), tail(x)); }
INLINE V k_complement(V s, V u) { return k_select(u > 0.0f, tail(u), 1.0f - s); }  // 1 - s, s = sigmoid(u)
INLINE V k_mul_sigmoid(V a, V b) { return a * k_sigmoid(b); }

// normal_cdf(x) from tail = normal_cdf(-|x|), which is negligible compared with 1 beyond 5.7.
INLINE V from_tail(V tail, V x) {
    const V kept = (V)((I)tail & ~(k_abs(x) >= 5.7f));  // propagates NaN
    return k_select(x > 0.0f, 1.0f - kept, kept);
}
INLINE V k_normal_cdf(V x) {
    const V t = at_most(k_abs(x), 5.75f);
    V q = t * 1.68024403e-08f - 5.15258307e-07f;  // -log(2 normal_cdf(-t)) / t
    q = q * t + 6.76684795e-06f;
    q = q * t - 4.83074582e-05f;
    q = q * t + 0.000178474875f;
    q = q * t + 2.9952882e-05f;
    q = q * t - 0.00484908326f;
    q = q * t + 0.0363702998f;
    q = q * t + 0.318301618f;
    q = q * t + 0.79788518f;
    return from_tail(0.5f * k_exp(-q * t), x);
}

// For tensors in bf16 a relative error of 2^-17 is negligible.
INLINE V k_div_bf16(V a, V b) {
#ifdef __AVX512F__
    const __m512 r = _mm512_rcp14_ps((__m512)b), e = _mm512_fnmadd_ps((__m512)b, r, (__m512)number(1.0f));
    const __mmask16 usual = _mm512_cmp_ps_mask(e, e, _CMP_ORD_Q);  // not 1 / 0, and not 1 / inf
    return a * (V)_mm512_mask_fmadd_ps(r, usual, e, r);
#else
    return a / b;
#endif
}
// Arguments of 2^x, whose reduction is one instruction with AVX-512 and valid for any x.
#define LOG2_E 1.44269504f
INLINE V split(V x, V *n) {  // x = n + r with |r| <= 1/2
#ifdef __AVX512DQ__
    const V r = (V)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    *n = x - r;
    return r;
#else
    x = bounded(x, -252.0f, 252.0f);  // what `scale` takes; 2^x is 0 or infinite long before
    *n = (x + ROUND) - ROUND;
    return x - *n;
#endif
}
INLINE V k_exp2_bf16(V x) {
    V n;
    const V r = split(x, &n);
    return scale((((r * 0.00958285f + 0.0559064299f) * r + 0.240240991f) * r + 0.693124175f) * r + 1.0f, n);
}
INLINE V exp2m1_reduced_bf16(V r) {  // 2^r - 1, exact to the first order near 0
    return (((r * 0.00960505164f + 0.0557803918f) * r + 0.240234448f) * r + 0.693147181f) * r;
}
INLINE V one_minus_exp2_bf16(V x) {  // for x <= 0
    V n;
    const V p = exp2m1_reduced_bf16(split(x, &n)), whole = scale(number(1.0f), n);
    return (1.0f - whole) - whole * p;
}
INLINE V with_sign(V magnitude, V x) { return (V)((I)magnitude | ((I)x & (I)number(-0.0f))); }  // of a magnitude >= 0
INLINE V k_exp_bf16(V x) { return k_exp2_bf16(x * LOG2_E); }
INLINE V k_expm1_bf16(V x) {
    V n;
    const V p = exp2m1_reduced_bf16(split(at_most(x, 89.0f) * LOG2_E, &n)), half = scale(number(0.5f), n);
    return 2.0f * (half * p + (half - 0.5f));  // half: 2^128 overflows
}
INLINE V k_sigmoid_bf16(V x) { return k_div_bf16(number(1.0f), 1.0f + k_exp2_bf16(x * -LOG2_E)); }
INLINE V k_complement_bf16(V s, V u) { return 1.0f - s; }
INLINE V k_mul_sigmoid_bf16(V a, V b) { return k_div_bf16(a, 1.0f + k_exp2_bf16(b * -LOG2_E)); }
INLINE V k_tanh_bf16(V x) {
    const V u = one_minus_exp2_bf16(k_abs(x) * (-2 * LOG2_E));  // 1 - exp(-2|x|)
    return with_sign(k_div_bf16(u, 2.0f - u), x);
}
INLINE V k_sech2_bf16(V t, V u) { return 1.0f - t * t; }
INLINE V k_erf_bf16(V x) {
    const V t = at_most(k_abs(x), 4.0f);  // erf(4) rounds to 1
    V q = t * -0.00297434638f + 0.0297340809f;  // log2(1 - erf(t)) / t, exact at 0
    q = q * t - 0.14888044f;
    q = q * t - 0.918393411f;
    q = q * t - 1.62790703f;
    return with_sign(one_minus_exp2_bf16(q * t), x);
}
INLINE V k_normal_cdf_bf16(V x) {
    const V t = k_abs(x);
    V q = t * -1.45180911e-06f + 5.45330586e-05f;  // (log2(normal_cdf(-t)) + 1) / t
    q = q * t - 0.000880064908f;
    q = q * t + 0.00833231770f;
    q = q * t - 0.0536528155f;
    q = q * t - 0.458715439f;
    q = q * t - 1.15117407f;
    return from_tail(k_exp2_bf16(q * t - 1.0f), x);
}
INLINE V k_softplus_bf16(V x) {
    const V z = k_exp2_bf16(k_abs(x) * -LOG2_E);
    V p = z * 0.0141409907f - 0.0664017019f;  // log1p(z) / z for z <= 1
    p = p * z + 0.149223754f;
    p = p * z - 0.235038535f;
    p = p * z + 0.331094471f;
    p = p * z - 0.499869654f;
    p = p * z + 0.999998731f;
    return k_select(x < 0.0f, number(0.0f), x) + p * z;
}

INLINE V log_of(V x, V correction) {  // log(x) + correction / x, for normal x > 0
    const I u = (I)x - 0x3f3504f3;  // mantissas from sqrt(1/2) to sqrt(2)
    const V n = __builtin_convertvector(u >> 23, V);
    const V f = (V)((u & 0x7fffff) + 0x3f3504f3) - 1.0f;
    V p = f * 0.0672498196f - 0.11676006f;
    p = p * f + 0.119009674f;
    p = p * f - 0.124073468f;
    p = p * f + 0.142176807f;
    p = p * f - 0.166676879f;
    p = p * f + 0.200022206f;
    p = p * f - 0.250000268f;
    p = p * f + 0.333333105f;
    p = p * f - 0.5f;
    const V low = f * f * p + (n * 0x1.7f7d1cp-20f + correction / x);
    return n * 0x1.62e4p-1f + (f + low);
}
INLINE V log_edges(V x, V y) {  // log(x) where x is 0, negative, infinite or NaN, else y
    const V edge = k_select(x == 0.0f, number(-__builtin_inff()), k_select(x < 0.0f, number(__builtin_nanf("")), x));
    return k_select((x > 0.0f) & (x < __builtin_inff()), y, edge);
}
INLINE V k_log(V x) {
    const I small = x < 0x1p-126f;
    const V y = log_of(k_select(small, x * 0x1p25f, x), number(0.0f));
    return log_edges(x, k_select(small, y - 25 * 0x1.62e43p-1f, y));
}
INLINE V k_log1p(V x) {
    const V u = 1.0f + x;
    return k_select(k_abs(x) < 0x1p-24f, x, log_edges(u, log_of(u, x - (u - 1.0f))));
}
INLINE V k_softplus(V x) {
    const V z = k_exp(-k_abs(x)), u = 1.0f + z;
    return k_select(x < 0.0f, number(0.0f), x) + k_select(z < 0x1p-24f, z, log_of(u, z - (u - 1.0f)));
}

INLINE V k_tanh(V x) {
    const V s = x * x;
    V p = s * -0.000358410674f + 0.002301272f;
    p = p * s - 0.00794606376f;
    p = p * s + 0.0214866996f;
    p = p * s - 0.0538798496f;
    p = p * s + 0.133323461f;
    p = p * s - 0.333332956f;
    const V large = copysign_(1.0f - 2.0f * tail(2.0f * x), x);
    return k_select(s < 1.0f, s * x * p + x, large);
}
INLINE V k_sech2(V t, V u) {  // 1 - t * t, t = tanh(u); for a large u the rounding of t would be most of that
    const V c = tail(2.0f * u), square = t * t;
    return k_select(square < 0.25f, 1.0f - square, 4.0f * c * (1.0f - c));
}

INLINE V k_erf(V x) {
    const V t = bounded(k_abs(x), 0.0f, 4.0f);  // erf(4) rounds to 1
    V q = t * -9.3410863e-06f + 0.000118428878f;  // (-log(1 - erf(t)) / t - 2 / sqrt(pi)) / t
    q = q * t - 0.000635767879f;
    q = q * t + 0.00167265185f;
    q = q * t - 0.000166357931f;
    q = q * t - 0.0191495959f;
    q = q * t + 0.102776803f;
    q = q * t + 0.636619508f;
    q = q * t - 0x1.f7ac92p-25f;  // 2 / sqrt(pi) in two parts: near 0 it is all there is, and its rounding would show
    return copysign_(k_expm1(-(q * t + t * 0x1.20dd76p+0f)), x);
}

INLINE V k_atan(V x) {
    const V a = k_abs(x), z = k_select(a > 1.0f, 1.0f / a, a), s = z * z;
    V p = s * 0.00111377181f - 0.00731787179f;
    p = p * s + 0.0225396883f;
    p = p * s - 0.0446897298f;
    p = p * s + 0.0674158186f;
    p = p * s - 0.0881108493f;
    p = p * s + 0.110582218f;
    p = p * s - 0.142798334f;
    p = p * s + 0.19999671f;
    p = p * s - 0.333333284f;
    // pi / 2 - y beyond 1; the low part of pi / 2 goes where it is not rounded at the size of the result.
    const V y = (s * z * p + k_select(a > 1.0f, number(0x1.777a5cp-25f), number(0.0f))) + z;
    return copysign_(k_select(a > 1.0f, 0x1.921fb6p+0f - y, y), x);
}

// x = n pi / 2 + r + low, accurate for |x| up to `FAR`; `low` is what rounding r has lost.
#define FAR 100000.0f
INLINE V reduce_circle(V x, I *n, V *low) {
    const V t = x * 0x1.45f306p-1f + ROUND, whole = t - ROUND;
    *n = (I)t;
    const V rest = (x - whole * 0x1.92p+0f) - whole * 0x1.fb4p-12f, r = rest - whole * 0x1.4442d2p-24f;
    // rest - r is exact where r is not small; where it is, its own rounding is small.
    const V lost = k_select(k_abs(r) > 0.01f, (rest - r) - whole * 0x1.4442d2p-24f, number(0.0f));
    *low = lost + whole * 0x1.ee59dap-50f;
    return r;
}
INLINE V circle(V r, V low, I n) {
    const V s = r * r, near_1 = 1.0f - 0.5f * s;
    const V sine = (s * r * ((s * -0.00019515217f + 0.0083321603f) * s - 0.166666552f) + low) + r;
    const V lost = (1.0f - near_1) - 0.5f * s;
    const V cosine = ((s * s * ((s * 2.44383773e-05f - 0.00138873665f) * s + 0.0416666456f) - r * low) + lost) + near_1;
    const V y = k_select((n & 1) != 0, cosine, sine);
    return k_select((n & 2) != 0, -y, y);
}
// Beyond `FAR`, which almost no vector reaches, the C library reduces the argument, whatever its size.
#define BEYOND(name)                                                                  \
    static __attribute__((noinline, cold)) void name##_beyond(const V *x, V *y) {      \
        for (int i = 0; i < LANES; i++)                                               \
            if (__builtin_fabsf((*x)[i]) > FAR) (*y)[i] = __builtin_##name##f((*x)[i]); \
    }
BEYOND(sin)
BEYOND(cos)
INLINE V k_sin(V x) {
    I n;
    V low;
    const V r = reduce_circle(x, &n, &low);
    V y = circle(r, low, n);
    if (__builtin_expect(any_lane(k_abs(x) > FAR), 0)) sin_beyond(&x, &y);
    return y;
}
INLINE V k_cos(V x) {
    I n;
    V low;
    const V r = reduce_circle(x, &n, &low);
    V y = circle(r, low, n + 1);
    if (__builtin_expect(any_lane(k_abs(x) > FAR), 0)) cos_beyond(&x, &y);
    return y;
}
