/* Computes on sixteen lanes at a time, with AVX-512 (and VNNI), AVX2, NEON or plain C.
 *
 * Arithmetic uses the compiler's vector extensions, which gcc and clang lower to the instructions of the machine.  Only products
 * of bytes and half precision, which C cannot express, have a path for each instruction set. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

INLINE f32x16 all(float x) { return (f32x16){} + x; }
INLINE f32x16 load(const float *p) { f32x16 v; memcpy(&v, p, 64); return v; }
INLINE void store(float *p, f32x16 v) { memcpy(p, &v, 64); }
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

/* For plain C, out of line: two hundred inlined copies would take a compiler half a minute. */
#define OUTLINE static __attribute__((noinline, unused))
OUTLINE i32x16 dot4_plain(i32x16 acc, u8x64 w, int32_t x) {
    const i32x16 b = (i32x16)w; /* of each lane the four bytes in turn, lowest first */
    int8_t f[4];
    memcpy(f, &x, 4);
    acc += (b & 255) * f[0] + (b >> 8 & 255) * f[1] + (b >> 16 & 255) * f[2] + (b >> 24 & 255) * f[3];
    return acc;
}

/* acc[i] + w[4i] x[0] + ... + w[4i + 3] x[3] for unsigned bytes w and the four signed bytes of x; exact. */
INLINE i32x16 dot4(i32x16 acc, u8x64 w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    __m256i a[2], b[2];
    memcpy(a, &acc, 64);
    memcpy(b, &w, 64);
    __m256i xs = _mm256_set1_epi32(x);
#if defined(__AVXVNNI__)
    for (int i = 0; i < 2; i++) a[i] = _mm256_dpbusd_avx_epi32(a[i], b[i], xs);
#else /* in 16 bits: _mm256_maddubs_epi16 would saturate */
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), odd = _mm256_srai_epi16(xs, 8);
    for (int i = 0; i < 2; i++) {
        __m256i low = _mm256_and_si256(b[i], _mm256_set1_epi16(255)), high = _mm256_srli_epi16(b[i], 8);
        a[i] = _mm256_add_epi32(a[i], _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
    }
#endif
    memcpy(&acc, a, 64);
    return acc;
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t a[4];
    uint8x16_t b[4];
    memcpy(a, &acc, 64);
    memcpy(b, &w, 64);
    int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        a[i] = vusdotq_s32(a[i], b[i], xs);
#else /* signed products only: w = (w - 128) + 64 + 64 */
        a[i] = vdotq_s32(a[i], vreinterpretq_s8_u8(veorq_u8(b[i], vdupq_n_u8(128))), xs);
        a[i] = vdotq_s32(vdotq_s32(a[i], vdupq_n_s8(64), xs), vdupq_n_s8(64), xs);
#endif
    }
    memcpy(&acc, a, 64);
    return acc;
#else
    return dot4_plain(acc, w, x);
#endif
}

#if !defined(__AVX512F__) && !defined(__F16C__) && !defined(__aarch64__)
INLINE float half_to_float(uint16_t h) {
    /* Exponent and mantissa move to their places in a float whose bias is 112 larger; infinities and NaNs have a rule apart. */
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
    bits |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    f = fabsf(f);
    if (f != f) return sign | 0x7e00;
    if (f >= 65520.0f) return sign | 0x7c00;
    if (f < 0x1p-14f) return sign | (uint16_t)lrintf(f * 0x1p24f); /* subnormal: steps of 2^-24 */
    memcpy(&bits, &f, 4);
    bits += 0xfff + (bits >> 13 & 1); /* to nearest, ties to even */
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
}
#endif

/* Sixteen half-precision numbers to and from float. */
#if !defined(__AVX512F__) && !defined(__F16C__) && !defined(__aarch64__)
#define CONVERSION OUTLINE
#else
#define CONVERSION INLINE
#endif
CONVERSION f32x16 load_half(const void *p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__F16C__)
    __m256 v[2] = {_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
    f32x16 f;
    memcpy(&f, v, 64);
    return f;
#elif defined(__aarch64__)
    float32x4_t v[4];
    for (int i = 0; i < 4; i++) v[i] = vcvt_f32_f16(vld1_f16((const float16_t *)p + 4 * i));
    f32x16 f;
    memcpy(&f, v, 64);
    return f;
#else
    uint16_t h[LANES];
    f32x16 f;
    memcpy(h, p, sizeof h);
    for (int i = 0; i < LANES; i++) f[i] = half_to_float(h[i]);
    return f;
#endif
}

CONVERSION void store_half(void *p, f32x16 f) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    __m256 v[2];
    memcpy(v, &f, 64);
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i *)p + i, _mm256_cvtps_ph(v[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    float32x4_t v[4];
    memcpy(v, &f, 64);
    for (int i = 0; i < 4; i++) vst1_f16((float16_t *)p + 4 * i, vcvt_f16_f32(v[i]));
#else
    uint16_t h[LANES];
    for (int i = 0; i < LANES; i++) h[i] = float_to_half(f[i]);
    memcpy(p, h, sizeof h);
#endif
}

/* As many lanes as a register has.  Inner loops use these: gcc keeps arrays of wider vectors in memory, and takes comparisons of
 * them apart into single numbers. */
#if defined(__AVX512F__) || !(defined(__F16C__) && defined(__AVX2__) || defined(__aarch64__))
#define NATIVE LANES
typedef f32x16 f32xn;
typedef i32x16 i32xn;
INLINE f32xn load_half_native(const uint16_t *p) { return load_half(p); }
#elif defined(__aarch64__)
#define NATIVE 4
typedef float f32xn __attribute__((vector_size(16)));
typedef int32_t i32xn __attribute__((vector_size(16)));
INLINE f32xn load_half_native(const uint16_t *p) { return (f32xn)vcvt_f32_f16(vld1_f16((const float16_t *)p)); }
#else
#define NATIVE 8
typedef float f32xn __attribute__((vector_size(32)));
typedef int32_t i32xn __attribute__((vector_size(32)));
INLINE f32xn load_half_native(const uint16_t *p) { return (f32xn)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#endif

/* Always in the same order, so that a sum is the same on every machine. */
INLINE float sum(f32x16 v) {
    float p[LANES];
    store(p, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) p[i] += p[i + n];
    return p[0];
}

INLINE float largest(f32x16 v) {
    float p[LANES];
    store(p, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) p[i] = p[i] > p[i + n] ? p[i] : p[i + n];
    return p[0];
}

INLINE f32xn choose_n(i32xn mask, f32xn a, f32xn b) { return (f32xn)(((i32xn)a & mask) | ((i32xn)b & ~mask)); }
INLINE f32xn all_n(float x) { return (f32xn){} + x; }
INLINE f32xn load_n(const float *p) { f32xn v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_n(float *p, f32xn v) { memcpy(p, &v, sizeof v); }

/* The greater of each two lanes, and the smaller.  b where one of them is NaN. */
#define EXTREME(name, than) \
    INLINE f32x16 name(f32x16 a, f32x16 b) { \
        f32xn x[LANES / NATIVE], y[LANES / NATIVE]; \
        memcpy(x, &a, sizeof a); \
        memcpy(y, &b, sizeof b); \
        for (int i = 0; i < LANES / NATIVE; i++) x[i] = choose_n(x[i] than y[i], x[i], y[i]); \
        memcpy(&a, x, sizeof a); \
        return a; \
    }
EXTREME(greater, >)
EXTREME(smaller, <)
INLINE f32x16 absolute(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }

/* To the nearest integer, for |v| < 2^22: adding 1.5 * 2^23 leaves no place for a fraction. */
INLINE i32x16 nearest(f32x16 v) { return (i32x16)(v + 0x1.8p23f) - 0x4b400000; }

/* exp(x) to 1e-7: 2^n * e^r with r within half of log 2, and the polynomial of the Cephes library for e^r. */
INLINE f32xn exponential_n(f32xn x) {
    x = choose_n(x > all_n(-87.0f), x, all_n(-87.0f));
    x = choose_n(x < all_n(88.0f), x, all_n(88.0f));
    i32xn n = (i32xn)(x * 1.44269504f + 0x1.8p23f) - 0x4b400000; /* see `nearest` */
    f32xn f = __builtin_convertvector(n, f32xn), r = x - f * 0.693359375f + f * 2.12194440e-4f;
    f32xn p = all_n(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (f32xn)((n + 127) << 23);
}
INLINE f32x16 exponential(f32x16 x) {
    f32xn parts[LANES / NATIVE];
    memcpy(parts, &x, sizeof x);
    for (int i = 0; i < LANES / NATIVE; i++) parts[i] = exponential_n(parts[i]);
    memcpy(&x, parts, sizeof x);
    return x;
}
