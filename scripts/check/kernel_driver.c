/* Runs the kernels of a CPU on numbers from standard input, for processors that this machine can only emulate (check_neon.py).
 * In: i32 kind, outputs, inputs, bits, gated, rows; W [outputs, inputs] of the kind; norm f32[inputs]; x and delta f32[rows, inputs];
 * then i32 heads, kv_heads, dim, tokens; qkv f32[tokens, (heads + 2 kv_heads) dim]; cos and sin f32[tokens, dim].
 * Out: the packed blocks, y, and what attention makes of one prompt over pages of 16 tokens in reverse order. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { const void *rows; int64_t row_bytes; void *blocks; int32_t kind, n, inputs, groups, bits, first, step, shift; } Pack;
typedef struct { const void *blocks; const float *bias; int32_t outputs, groups, inputs, bits, gated; } Weight;
typedef struct { const float *weight; float eps; } Norm;
typedef struct {
    void *cache; const float *q_norm, *k_norm, *sinks; float eps, scale, softcap;
    int32_t page_size, heads, kv_heads, dim, window;
} Layer;
typedef struct {
    const int64_t *slots; const float *cos, *sin; const int32_t *items, *pages;
    int32_t n_tokens, n_items, pages_per_row, rotary;
} Step;
void pack(const Pack *, int32_t);
void linear(const Weight *, const Norm *, const float *, float *, float *, int32_t, uint8_t *, int32_t);
void attention(const Layer *, const Step *, float *, float *, int32_t);
int64_t scratch_bytes(int32_t, int32_t);

static void *in(size_t bytes) {
    void *p = malloc(bytes);
    if (fread(p, 1, bytes, stdin) != bytes) exit(2);
    return p;
}

int main(void) {
    const int32_t *a = in(24), outputs = a[1], inputs = a[2], bits = a[3], rows = a[5], groups = (inputs + 31) / 32;
    const int64_t row_bytes = (int64_t)inputs * (a[0] == 0 ? 4 : 2), packed = (outputs + 15) / 16 * groups * (bits == 4 ? 320 : 544);
    void *blocks = calloc(1, packed);
    const void *w = in(outputs * row_bytes);
    if (a[4]) { /* gate and up in turns */
        Pack gate = {w, row_bytes, blocks, a[0], outputs / 2, inputs, groups, bits, 0, 2, 0}, up = gate;
        up.rows = (const char *)w + outputs / 2 * row_bytes, up.shift = 1;
        pack(&gate, 2), pack(&up, 2);
    } else
        pack(&(Pack){w, row_bytes, blocks, a[0], outputs, inputs, groups, bits, 0, 1, 0}, 2);
    fwrite(blocks, 1, packed, stdout);
    const Weight weight = {blocks, NULL, outputs, groups, inputs, bits, a[4]};
    const Norm norm = {in(inputs * 4), 1e-5f};
    float *x = in(rows * inputs * 4), *delta = in(rows * inputs * 4), *y = malloc(rows * outputs * 4);
    linear(&weight, &norm, delta, x, y, rows, malloc(scratch_bytes(rows, groups)), 2);
    fwrite(y, 4, (size_t)rows * (a[4] ? outputs / 2 : outputs), stdout);

    const int32_t *b = in(16), heads = b[0], kv = b[1], dim = b[2], n = b[3], n_pages = (n + 15) / 16;
    float *qkv = in((size_t)n * (heads + 2 * kv) * dim * 4), *out = malloc((size_t)n * heads * dim * 4);
    int64_t *slots = malloc(n * 8);
    int32_t *pages = malloc(n_pages * 4), items[] = {0, n / 2, 0, 0, n / 2, n - n / 2, n / 2, 0};
    for (int i = 0; i < n_pages; i++) pages[i] = n_pages - 1 - i;
    for (int i = 0; i < n; i++) slots[i] = pages[i / 16] * 16 + i % 16;
    const float *cos = in((size_t)n * dim * 4), *sin = in((size_t)n * dim * 4);
    const Layer l = {calloc(n_pages * 16, 4 * kv * dim), NULL, NULL, NULL, 0, 0.25f, 0, 16, heads, kv, dim, n / 3};
    const Step s = {slots, cos, sin, items, pages, n, 2, n_pages, dim};
    attention(&l, &s, qkv, out, 2);
    fwrite(out, 4, (size_t)n * heads * dim, stdout);
    return 0;
}
