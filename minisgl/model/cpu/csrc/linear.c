/* Multiplies y = x W^T with W in 4 or 8 bits and x quantised to two bytes on the way, for one to some hundred rows.
 *
 * W [N, K] is cut into tiles of 16 outputs, and a tile into groups of 32 inputs, each one block of bytes:
 *   8 bits: 8 x [16 outputs][4 inputs] u8, of 128 + q; d f16[16]                     weight = d * q         (544 bytes)
 *   4 bits: 4 x [16 outputs][4 inputs] of two u4, inputs 4v.. low, 16 + 4v.. high;
 *           d f16[16]; m f16[16]                                                     weight = d * q + m     (320 bytes)
 * A thread reads its part from front to back, and 4 inputs of 16 outputs are one instruction.  The numbers are those of GGUF's
 * Q8_0 and Q4_1, in another order.
 *
 * A row of x has a scale s for each group of 32, and x = s * (q + r / 254) with bytes q and r: the error of 8 bits alone would
 * exceed that of 4-bit weights, and products of bytes are cheap compared with reading the weights.  Sums within a group are
 * exact integers, groups are added in order, and rows are independent: the result of a row depends on its values alone.
 *
 * AVX2 without VNNI has no product of bytes that neither saturates nor costs six instructions.  There (WORDS) x is one number of
 * 16 bits, 254 q + r, and weights are widened to 16 bits: two products of words for each 4 inputs do the work of q and r. */
#include "pool.h"
#include "simd.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define WORDS 1
#else
#define WORDS 0
#endif

#define GROUP 32
#define ROWS 8     /* rows that share an unpacked group: their sums, the group and its scales fit into 32 registers */
#define CHUNK 128  /* rows whose inputs stay in the second-level cache while all weights pass */
#define SHARES 4   /* items per thread, so that other threads take those of a late one */

typedef struct {
    int8_t *q;     /* [T, K / 32, 2, 32]: q and r of each group; with WORDS i16 [T, K / 32, 8, 4], see quantise_group */
    float *scale;  /* [T, K / 32] */
    float *total;  /* [T, K / 32]: the sum of x over each group */
} Quantised;

typedef struct {
    const uint8_t *blocks;
    const float *bias; /* [N] or NULL */
    int32_t outputs;   /* N; the last tile may have fewer than 16 */
    int32_t groups;    /* K / 32, rounded up */
    int32_t inputs;    /* K */
    int32_t bits;      /* 4 or 8 */
    int32_t gated;     /* activation of a pair: 0 none, 1 silu(tile 2j) * tile 2j + 1, 2 with tanh-gelu for silu */
} Weight;

typedef struct {
    const float *weight; /* [K] of an RMSNorm */
    float eps;
} Norm;

/* Returns zeros, with NaN among them if x has NaN or infinity, which bytes cannot show. */
INLINE f32x16 quantise_group(const float *x, int8_t *q, float *scale, float *total) {
    f32x16 a = load(x), b = load(x + LANES);
    float most = largest(greater(absolute(a), absolute(b)));
    float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    i32x16 qa = nearest(a * inverse), qb = nearest(b * inverse), s = qa + qb;
    i32x16 ra = nearest((a * inverse - to_float(qa)) * 254.0f), rb = nearest((b * inverse - to_float(qb)) * 254.0f), t = ra + rb;
    int32_t sum = 0, rest = 0;
#if WORDS /* of 4 inputs the first and third, which meet the even bytes of a weight, then the second and fourth */
    i32x16 words[2] = {qa * 254 + ra, qb * 254 + rb};
    const int32_t *from = (const int32_t *)words;
    int16_t *to = (int16_t *)q;
    for (int i = 0; i < GROUP; i += 4)
        to[i] = from[i], to[i + 1] = from[i + 2], to[i + 2] = from[i + 1], to[i + 3] = from[i + 3];
#else
    for (int i = 0; i < LANES; i++) q[i] = (int8_t)qa[i], q[i + LANES] = (int8_t)qb[i];
    for (int i = 0; i < LANES; i++) q[GROUP + i] = (int8_t)ra[i], q[GROUP + i + LANES] = (int8_t)rb[i];
#endif
    for (int i = 0; i < LANES; i++) sum += s[i], rest += t[i];
    *scale = most / 127.0f;
    *total = *scale * (sum + rest * (1.0f / 254.0f));
    return a * 0.0f + b * 0.0f;
}

/* One row: x += delta, x / rms(x) * weight, quantise. */
static void prepare_row(float *x, const float *delta, const Norm *norm, int inputs, int8_t *q, float *scale, float *total) {
    float buffer[GROUP], factor = 1.0f;
    if (delta)
        for (int i = 0; i < inputs; i++) x[i] += delta[i];
    if (norm) {
        f32x16 squares = all(0.0f);
        int i = 0;
        for (; i + LANES <= inputs; i += LANES) squares += load(x + i) * load(x + i);
        float rest = 0.0f;
        for (; i < inputs; i++) rest += x[i] * x[i];
        factor = 1.0f / sqrtf((sum(squares) + rest) / inputs + norm->eps);
    }
    f32x16 zeros = all(0.0f);
    for (int i = 0; i < inputs; i += GROUP) {
        int n = inputs - i < GROUP ? inputs - i : GROUP;
        if (n < GROUP) memset(buffer, 0, sizeof buffer);
        if (norm)
            for (int j = 0; j < n; j++) buffer[j] = x[i + j] * factor * norm->weight[i + j];
        else
            memcpy(buffer, x + i, n * sizeof(float));
        zeros += quantise_group(buffer, q + 2 * i, scale + i / GROUP, total + i / GROUP);
    }
    if (sum(zeros) != 0.0f) *scale = NAN; /* and so is every product with this row */
}

#if WORDS
typedef int32_t v8 __attribute__((vector_size(32)));

/* Sixteen outputs of the `rows` rows from `first`, eight at a time: their sums of up to 8 rows fit into 16 registers. */
INLINE void tile(const int rows, const int bits, const uint8_t *w, int groups, Quantised x, int64_t first, f32x16 *y) {
    const __m256i low = _mm256_set1_epi16(bits == 4 ? 15 : 255), middle = _mm256_set1_epi16(128);
    const int64_t stride = groups * 2 * GROUP;
    __m256 acc[2][ROWS];
    for (int r = 0; r < rows; r++) acc[0][r] = acc[1][r] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++) {
        const uint8_t *scales = w + (bits == 4 ? 256 : 512);
        const int8_t *rows_at = x.q + (first * groups + g) * 2 * GROUP;
        for (int h = 0; h < 2; h++) {
            v8 dot[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) dot[r] = (v8){};
#pragma GCC unroll 1
            for (int v = 0; v < 8; v++) {
                __m256i b = _mm256_loadu_si256((const __m256i *)(w + 64 * (bits == 4 ? v % 4 : v) + 32 * h));
                if (bits == 4 && v >= 4) b = _mm256_srli_epi16(b, 4);
                __m256i even = _mm256_and_si256(b, low), odd = _mm256_and_si256(_mm256_srli_epi16(b, 8), low);
                if (bits == 8) even = _mm256_sub_epi16(even, middle), odd = _mm256_sub_epi16(odd, middle);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    const float *pairs = (const float *)(rows_at + r * stride + 8 * v);
                    const __m256i x0 = (__m256i)_mm256_broadcast_ss(pairs), x1 = (__m256i)_mm256_broadcast_ss(pairs + 1);
                    dot[r] += (v8)_mm256_madd_epi16(even, x0);
                    dot[r] += (v8)_mm256_madd_epi16(odd, x1);
                }
            }
            const __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales + h));
            const __m256 m = bits == 4 ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales + 2 + h)) : _mm256_setzero_ps();
            for (int r = 0; r < rows; r++) {
                const int64_t at = (first + r) * groups + g;
                /* Fused by hand: what the compiler fuses depends on the number of rows, and a row's result must not. */
                const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps((__m256i)dot[r]), _mm256_set1_ps(x.scale[at] * (1.0f / 254.0f)));
                acc[h][r] = _mm256_fmadd_ps(product, d, acc[h][r]);
                if (bits == 4) acc[h][r] = _mm256_fmadd_ps(m, _mm256_set1_ps(x.total[at]), acc[h][r]);
            }
        }
        w = scales + (bits == 4 ? 64 : 32);
    }
    for (int r = 0; r < rows; r++) memcpy(y + r, &acc[0][r], 32), memcpy((char *)(y + r) + 32, &acc[1][r], 32);
}
#else
/* Sixteen outputs of the `rows` rows from `first`. */
INLINE void tile(const int rows, const int bits, const uint8_t *w, int groups, Quantised x, int64_t first, f32x16 *y) {
    const u8x64 low = (u8x64){} + 15;
    f32x16 acc[ROWS];
    for (int r = 0; r < rows; r++) acc[r] = all(0.0f);
    for (int g = 0; g < groups; g++) {
        u8x64 q[8];
        f32x16 d, m = all(0.0f);
        if (bits == 4) {
            for (int v = 0; v < 4; v++) {
                u8x64 both;
                memcpy(&both, w + 64 * v, 64);
                q[v] = both & low;
                q[v + 4] = (u8x64)((i32x16)both >> 4) & low;
            }
            d = load_half(w + 256), m = load_half(w + 288);
            w += 320;
        } else {
            memcpy(q, w, 512);
            d = load_half(w + 512);
            w += 544;
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const int64_t at = (first + r) * groups + g;
            const int8_t *xq = x.q + at * 2 * GROUP;
            i32x16 dot = {}, rest = {};
#pragma GCC unroll 8
            for (int v = 0; v < 8; v++) {
                int32_t four;
                memcpy(&four, xq + 4 * v, 4);
                dot = dot4(dot, q[v], four);
                memcpy(&four, xq + GROUP + 4 * v, 4);
                rest = dot4(rest, q[v], four);
            }
            f32x16 product = to_float(dot) + to_float(rest) * (1.0f / 254.0f);
            if (bits == 4)
                acc[r] += product * x.scale[at] * d + m * x.total[at];
            else
                acc[r] += (product * x.scale[at] - 128.0f * x.total[at]) * d;
        }
    }
    for (int r = 0; r < rows; r++) y[r] = acc[r];
}
#endif

static void tiles(int rows, int bits, const uint8_t *w, int groups, Quantised x, int64_t first, f32x16 *y) {
#define CASE(n) \
    case n: bits == 4 ? tile(n, 4, w, groups, x, first, y) : tile(n, 8, w, groups, x, first, y); break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

INLINE f32x16 activate(f32x16 gate, int kind) {
    if (kind == 2) { /* tanh-gelu: x * sigmoid(1.5957691 * (x + 0.044715 x^3)) */
        f32x16 inner = (gate + gate * gate * gate * 0.044715f) * 1.59576912f;
        return gate / (exponential(-inner) + 1.0f);
    }
    return gate / (exponential(-gate) + 1.0f);
}

typedef struct {
    const Weight *w;
    const Norm *norm;
    const float *delta;
    float *x, *y;
    Quantised q;
    int32_t n_rows, rows_from, rows_to; /* all rows, and the present chunk of them */
    int32_t items, share;               /* items of rows to prepare; tiles, or pairs of tiles, in an item of the product */
} Product;

/* Rows i, i + items, i + 2 items, ... */
static void prepare_item(void *args, int32_t i) {
    const Product *p = args;
    const int64_t inputs = p->w->inputs, groups = p->w->groups;
    for (int64_t t = i; t < p->n_rows; t += p->items)
        prepare_row(p->x + t * inputs, p->delta ? p->delta + t * inputs : NULL, p->norm, inputs, p->q.q + t * groups * 2 * GROUP,
                    p->q.scale + t * groups, p->q.total + t * groups);
}

static void product_item(void *args, int32_t item) {
    const Product *p = args;
    const Weight *w = p->w;
    const int step = w->gated ? 2 : 1, width = w->outputs / step, n_tiles = (width + LANES - 1) / LANES;
    const int64_t bytes = w->groups * (w->bits == 4 ? 320 : 544);
    int end = (item + 1) * p->share < n_tiles ? (item + 1) * p->share : n_tiles;
    for (int i = item * p->share; i < end; i++)
        for (int t = p->rows_from; t < p->rows_to; t += ROWS) {
            int rows = p->rows_to - t < ROWS ? p->rows_to - t : ROWS, at = i * LANES;
            int n = width - at < LANES ? width - at : LANES;
            f32x16 out[2][ROWS];
            for (int s = 0; s < step; s++)
                tiles(rows, w->bits, w->blocks + (i * step + s) * bytes, w->groups, p->q, t, out[s]);
            for (int r = 0; r < rows; r++) {
                f32x16 v = w->gated ? activate(out[0][r], w->gated) * out[1][r] : out[0][r];
                float *to = p->y + (int64_t)(t + r) * width + at;
                if (n == LANES)
                    store(to, w->bias ? v + load(w->bias + at) : v);
                else
                    for (int j = 0; j < n; j++) to[j] = v[j] + (w->bias ? w->bias[at + j] : 0.0f);
            }
        }
}

/* x f32[T, K] -> y f32[T, N], or [T, N / 2] if gated.  `delta` [T, K], if not NULL, is first added to x in place, and `norm`,
 * if not NULL, applied.  `scratch`: see scratch_bytes. */
void linear(const Weight *w, const Norm *norm, const float *delta, float *x, float *y, int32_t n_rows, uint8_t *scratch,
            int32_t threads) {
    Product p = {.w = w, .norm = norm, .delta = delta, .x = x, .y = y, .n_rows = n_rows};
    p.q.scale = (float *)scratch;
    p.q.total = p.q.scale + (int64_t)n_rows * w->groups;
    p.q.q = (int8_t *)(p.q.total + (int64_t)n_rows * w->groups);
    /* A few rows take less time than waking a helper. */
    p.items = n_rows < 4 ? 1 : threads * 2 < n_rows ? threads * 2 : n_rows;
    parallel(prepare_item, &p, p.items, threads);
    const int n_tiles = (w->outputs / (w->gated ? 2 : 1) + LANES - 1) / LANES;
    p.share = (n_tiles + threads * SHARES - 1) / (threads * SHARES);
    for (p.rows_from = 0; p.rows_from < n_rows; p.rows_from += CHUNK) {
        p.rows_to = p.rows_from + CHUNK < n_rows ? p.rows_from + CHUNK : n_rows;
        parallel(product_item, &p, (n_tiles + p.share - 1) / p.share, threads);
    }
}

/* Bytes of scratch memory for `linear`. */
int64_t scratch_bytes(int32_t n_rows, int32_t groups) { return (int64_t)n_rows * groups * (2 * GROUP + 2 * sizeof(float)); }
