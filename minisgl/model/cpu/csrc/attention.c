/* Computes attention of one layer over the paged KV cache: normalises and rotates queries and keys, writes keys and values to
 * the cache, then softmax(q K^T) V for decode rows and prompt chunks.
 *
 * The cache is in half precision.  A page has, for each KV head, keys [page_size / 16][D][16 tokens] and values [page_size][D].
 * 16 tokens of a key dimension are adjacent, so that their scores are one vector and no sum over D crosses lanes.
 *
 * A row (one query head of one token) visits the tokens in the same blocks whatever rows are computed with it, so its result
 * does not depend on the rest of the batch. */
#include "pool.h"
#include "simd.h"

#define ROWS 8      /* rows that share each load from the cache */
#define BLOCK 128   /* tokens between two updates of the maximum (online softmax: Milakov, Gimelshein, arXiv:1805.02867) */
#define MAX_DIM 512
#define UNSEEN -1e30f

typedef struct {
    uint16_t *cache;  /* of this layer: [pages, K, 2, page_size * D] */
    const float *q_norm, *k_norm; /* [D] or NULL */
    const float *sinks; /* [H] or NULL */
    float eps, scale, softcap;
    int32_t page_size, heads, kv_heads, dim, window;
} Layer;

typedef struct {
    const int64_t *slots; /* [T]: place of each token's keys and values, page * page_size + offset */
    const float *cos, *sin; /* [T, rotary]; the first half of sin is negated */
    const int32_t *items; /* [n_items, 4]: first token of the step, tokens, position of the first, row of `pages` */
    const int32_t *pages; /* [rows, pages_per_row] */
    int32_t n_tokens, n_items, pages_per_row, rotary;
} Step;

static void normalise(float *x, const float *weight, int dim, float eps) {
    f32x16 squares = all(0.0f);
    for (int i = 0; i < dim; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1.0f / sqrtf(sum(squares) / dim + eps);
    for (int i = 0; i < dim; i += LANES) store(x + i, load(x + i) * factor * load(weight + i));
}

static void rotate(float *x, const float *cos, const float *sin, int n) {
    for (int i = 0; i < n / 2; i++) {
        float a = x[i], b = x[i + n / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + n / 2] = b * cos[i + n / 2] + a * sin[i + n / 2];
    }
}

/* To what half precision holds; NaN stays. */
INLINE f32x16 saturate(f32x16 v) { return smaller(all(65504.0f), greater(all(-65504.0f), v)); }

/* Rotates one token's queries in qkv, and writes its keys and values to the cache. */
static void enter_token(const Layer *l, const Step *s, float *qkv, int token) {
    const int d = l->dim;
    for (int h = 0; h < l->heads + l->kv_heads; h++) {
        float *x = qkv + h * d;
        const float *norm = h < l->heads ? l->q_norm : l->k_norm;
        if (norm) normalise(x, norm, d, l->eps);
        if (s->cos) rotate(x, s->cos + (int64_t)token * s->rotary, s->sin + (int64_t)token * s->rotary, s->rotary);
    }
    int64_t page = s->slots[token] / l->page_size, offset = s->slots[token] % l->page_size;
    for (int k = 0; k < l->kv_heads; k++) {
        uint16_t *keys = l->cache + (page * l->kv_heads + k) * 2 * l->page_size * d, *values = keys + (int64_t)l->page_size * d;
        const float *key = qkv + (l->heads + k) * d, *value = key + l->kv_heads * d;
        uint16_t *to = keys + offset / LANES * LANES * d + offset % LANES;
        for (int i = 0; i < d; i += LANES) {
            uint16_t halves[LANES];
            store_half(halves, saturate(load(key + i)));
            for (int j = 0; j < LANES; j++) to[(i + j) * LANES] = halves[j];
            store_half(values + offset * d + i, saturate(load(value + i)));
        }
    }
}

/* Scores of 16 tokens: out[r] = q[..][r] . keys. */
INLINE void scores(const int rows, const float (*q)[ROWS], const uint16_t *keys, int dim, float (*out)[BLOCK]) {
    for (int lane = 0; lane < LANES; lane += NATIVE) {
        f32xn acc[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) acc[r] = all_n(0.0f);
        for (int i = 0; i < dim; i++) {
            f32xn k = load_half_native(keys + i * LANES + lane);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) acc[r] += k * q[i][r];
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) store_n(out[r] + lane, acc[r]);
    }
}

/* out[r][0..NATIVE] += p[r] . values of n tokens, `dim` apart. */
INLINE void weigh(const int rows, float (*p)[BLOCK], const uint16_t *values, int n, int dim, float (*out)[MAX_DIM]) {
    f32xn acc[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) acc[r] = load_n(out[r]);
    for (int t = 0; t < n; t++) {
        f32xn v = load_half_native(values + (int64_t)t * dim);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) acc[r] += v * p[r][t];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) store_n(out[r], acc[r]);
}

#define SWITCH_ROWS(CALL) \
    switch (rows) { \
        case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break; case 4: CALL(4); break; \
        case 5: CALL(5); break; case 6: CALL(6); break; case 7: CALL(7); break; case 8: CALL(8); break; \
    }

/* Up to ROWS rows of one KV head.  position[r]: of the row's token, which sees the tokens up to itself. */
static void attend(const Layer *l, const int32_t *pages, int kv_head, int rows, const float *const *q, const int *position,
                   const int *head, float *const *out) {
    const int d = l->dim;
    float acc[ROWS][MAX_DIM], p[ROWS][BLOCK], queries[MAX_DIM][ROWS], most[ROWS], total[ROWS];
    int first = 0, last = 0, start[ROWS];
    for (int r = 0; r < rows; r++) {
        start[r] = l->window && position[r] >= l->window ? position[r] - l->window + 1 : 0;
        if (r == 0 || start[r] < first) first = start[r];
        if (position[r] > last) last = position[r];
        most[r] = l->sinks ? l->sinks[head[r]] : UNSEEN;
        total[r] = l->sinks ? 1.0f : 0.0f;
        memset(acc[r], 0, d * sizeof(float));
        for (int i = 0; i < d; i++) queries[i][r] = q[r][i];
    }
    static const int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32xn lane;
    memcpy(&lane, lanes, sizeof lane);
    for (int block = first / BLOCK * BLOCK; block <= last; block += BLOCK) {
        int end = last + 1 < block + BLOCK ? last + 1 : block + BLOCK, from = first > block ? first / LANES * LANES : block;
        for (int t = from; t < end; t += LANES) {
            const uint16_t *keys = l->cache + ((int64_t)pages[t / l->page_size] * l->kv_heads + kv_head) * 2 * l->page_size * d +
                                   t % l->page_size * d;
            float(*to)[BLOCK] = (float(*)[BLOCK])(p[0] + (t - block));
#define CALL(n) scores(n, queries, keys, d, to)
            SWITCH_ROWS(CALL)
#undef CALL
        }
        const int until = (end + LANES - 1) / LANES * LANES; /* scores stand up to here */
        for (int r = 0; r < rows; r++) {
            f32xn best = all_n(UNSEEN);
            for (int t = from; t < until; t += NATIVE) {
                f32xn v = load_n(p[r] + (t - block)) * l->scale;
                if (l->softcap > 0.0f) /* c * tanh(v / c), tanh by way of exp */
                    v = l->softcap - 2.0f * l->softcap / (exponential_n(v * (2.0f / l->softcap)) + 1.0f);
                i32xn at = lane + t;
                v = choose_n((at <= position[r]) & (at >= start[r]), v, all_n(UNSEEN));
                best = choose_n(best > v, best, v);
                store_n(p[r] + (t - block), v);
            }
            float m = most[r];
            for (int i = 0; i < NATIVE; i++) m = best[i] > m ? best[i] : m;
            f32xn parts[LANES / NATIVE] = {};
            for (int t = from; t < until; t += LANES)
                for (int i = 0; i < LANES / NATIVE; i++) {
                    f32xn v = load_n(p[r] + (t - block) + i * NATIVE);
                    v = choose_n(v > all_n(UNSEEN), exponential_n(v - m), all_n(0.0f));
                    parts[i] += v;
                    store_n(p[r] + (t - block) + i * NATIVE, v);
                }
            f32x16 sums;
            memcpy(&sums, parts, sizeof sums);
            if (m > most[r]) {
                float factor = total[r] > 0.0f ? expf(most[r] - m) : 0.0f;
                for (int i = 0; i < d; i += LANES) store(acc[r] + i, load(acc[r] + i) * factor);
                total[r] *= factor, most[r] = m;
            }
            total[r] += sum(sums);
        }
        for (int t = from; t < end;) { /* to the end of a page */
            int offset = t % l->page_size, n = l->page_size - offset < end - t ? l->page_size - offset : end - t;
            const uint16_t *values = l->cache + (((int64_t)pages[t / l->page_size] * l->kv_heads + kv_head) * 2 + 1) *
                                   l->page_size * d + (int64_t)offset * d;
            for (int i = 0; i < d; i += NATIVE) {
                float(*to)[MAX_DIM] = (float(*)[MAX_DIM])(acc[0] + i);
                float(*weights)[BLOCK] = (float(*)[BLOCK])(p[0] + (t - block));
#define CALL(k) weigh(k, weights, values + i, n, d, to)
                SWITCH_ROWS(CALL)
#undef CALL
            }
            t += n;
        }
    }
    f32x16 nan = all(0.0f);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < d; i += LANES) {
            store(out[r] + i, load(acc[r] + i) / total[r]);
            nan += load(out[r] + i) * 0.0f;
        }
    /* A value that is NaN reaches the rows that do not see it, too, with a weight of 0.  Alone a row reads what it sees. */
    if (rows > 1 && sum(nan) != 0.0f)
        for (int r = 0; r < rows; r++) attend(l, pages, kv_head, 1, q + r, position + r, head + r, out + r);
}

typedef struct {
    const Layer *l;
    const Step *s;
    float *qkv, *out;
    int64_t width;
    int32_t items;
} Call;

static void enter_item(void *args, int32_t i) {
    const Call *c = args;
    for (int t = i; t < c->s->n_tokens; t += c->items) enter_token(c->l, c->s, c->qkv + t * c->width, t);
}

static void attend_item(void *args, int32_t i) {
    const Call *c = args;
    const Layer *l = c->l;
    const int32_t *item = c->s->items + 4 * (i / l->kv_heads), *pages = c->s->pages + (int64_t)item[3] * c->s->pages_per_row;
    const int kv_head = i % l->kv_heads, group = l->heads / l->kv_heads, n = item[1] * group;
    for (int row = 0; row < n; row += ROWS) {
        const float *q[ROWS];
        float *to[ROWS];
        int position[ROWS], head[ROWS], rows = n - row < ROWS ? n - row : ROWS;
        for (int r = 0; r < rows; r++) {
            int token = (row + r) / group;
            head[r] = kv_head * group + (row + r) % group;
            q[r] = c->qkv + (item[0] + token) * c->width + head[r] * l->dim;
            to[r] = c->out + ((int64_t)(item[0] + token) * l->heads + head[r]) * l->dim;
            position[r] = item[2] + token;
        }
        attend(l, pages, kv_head, rows, q, position, head, to);
    }
}

/* qkv f32[T, (H + 2K) * D], changed -> out f32[T, H * D]. */
void attention(const Layer *l, const Step *s, float *qkv, float *out, int32_t threads) {
    Call c = {l, s, qkv, out, (int64_t)(l->heads + 2 * l->kv_heads) * l->dim, 1};
    if (s->n_tokens >= 4) c.items = threads * 2 < s->n_tokens ? threads * 2 : s->n_tokens;
    parallel(enter_item, &c, c.items, threads);
    parallel(attend_item, &c, s->n_items * l->kv_heads, threads);
}
