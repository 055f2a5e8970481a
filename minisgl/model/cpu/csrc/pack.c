/* Packs matrices into the tiles that linear.c multiplies by: rounded from floating point, or the numbers of GGUF's Q4_0, Q4_1
 * and Q8_0 as they are stored.  packing.py is the same in torch. */
#include "pool.h"
#include "simd.h"

#define GROUP 32
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 }; /* ggml's numbers of these types */

typedef struct {
    const uint8_t *rows; /* [n] of row_bytes each: floating-point inputs, or blocks */
    int64_t row_bytes;
    uint8_t *blocks;     /* [tiles, groups, 320 or 544], zero where nothing is written */
    int32_t kind, n, inputs, groups, bits;
    int32_t first;       /* place of row 0 */
    int32_t step, shift; /* tile i is stored as tile i * step + shift */
} Pack;

/* Numbers u8[32] of one row (of 4 bits in pairs, u8[16]) to their places in a block. */
INLINE void place(uint8_t *block, int lane, const uint8_t *numbers, int n) {
    for (int v = 0; v < n / 4; v++) memcpy(block + v * 4 * LANES + lane * 4, numbers + 4 * v, 4);
}

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
INLINE void store_bytes(uint8_t *p, i32x16 v) {
    const u8x16 bytes = __builtin_convertvector(v, u8x16);
    memcpy(p, &bytes, sizeof bytes);
}

/* Sixteen inputs as floats. */
INLINE f32x16 load_inputs(const uint8_t *row, int i, int kind) {
    if (kind == F32) return load((const float *)row + i);
    if (kind == F16) return load_half(row + 2 * i);
    u16x16 halves; /* bfloat16: the upper halves of floats */
    memcpy(&halves, row + 2 * i, sizeof halves);
    return (f32x16)(__builtin_convertvector(halves, i32x16) << 16);
}

INLINE void round_rows(const Pack *p, int from, int rows, int g, uint8_t *const *block, const int *lane) {
    float x[LANES][GROUP], low[LANES] = {0}, high[LANES] = {0};
    const int n = p->inputs - g * GROUP < GROUP ? p->inputs - g * GROUP : GROUP, body = p->bits == 4 ? 256 : 512;
    for (int r = 0; r < rows; r++) {
        const int width = p->kind == F32 ? 4 : 2;
        const uint8_t *row = p->rows + (from + r) * p->row_bytes + (int64_t)g * GROUP * width;
        uint8_t padded[GROUP * sizeof(float)] = {0};
        if (n < GROUP) row = memcpy(padded, row, n * width);
        f32x16 a = load_inputs(row, 0, p->kind), b = load_inputs(row, LANES, p->kind);
        store(x[r], a), store(x[r] + LANES, b);
        high[r] = p->bits == 4 ? largest(greater(a, b)) : largest(greater(absolute(a), absolute(b)));
        if (p->bits == 4) low[r] = -largest(greater(-a, -b));
    }
    uint16_t scale[LANES], offset[LANES];
    float steps[LANES], offsets[LANES];
    store_half(scale, p->bits == 4 ? (load(high) - load(low)) / 15.0f : load(high) / 127.0f);
    store_half(offset, load(low));
    store(steps, load_half(scale));
    store(offsets, load_half(offset));
    for (int r = 0; r < rows; r++) {
        uint8_t numbers[GROUP];
        i32x16 q[2] = {{0}, {0}};
        const f32x16 top = all(p->bits == 4 ? 15.0f : 127.0f), bottom = all(p->bits == 4 ? 0.0f : -127.0f);
        for (int h = 0; h < 2 && steps[r] > 0.0f; h++)
            q[h] = nearest(smaller(greater((load(x[r] + h * LANES) - offsets[r]) / steps[r], bottom), top));
        if (p->bits == 4)
            store_bytes(numbers, q[0] | q[1] << 4);
        else
            store_bytes(numbers, q[0] + 128), store_bytes(numbers + LANES, q[1] + 128);
        place(block[r], lane[r], numbers, p->bits == 4 ? 16 : 32);
        memcpy(block[r] + body + 2 * lane[r], scale + r, 2);
        if (p->bits == 4) memcpy(block[r] + body + 32 + 2 * lane[r], offset + r, 2);
    }
}

INLINE void copy_rows(const Pack *p, int from, int rows, int g, uint8_t *const *block, const int *lane) {
    const int width = p->kind == Q8_0 ? 34 : p->kind == Q4_1 ? 20 : 18, head = p->kind == Q4_1 ? 4 : 2;
    for (int r = 0; r < rows; r++) {
        const uint8_t *stored = p->rows + (from + r) * p->row_bytes + g * width;
        uint8_t numbers[GROUP];
        memcpy(numbers, stored + head, width - head);
        if (p->kind == Q8_0)
            for (int i = 0; i < GROUP; i++) numbers[i] ^= 128;
        place(block[r], lane[r], numbers, width - head);
        uint8_t *scale = block[r] + (p->bits == 4 ? 256 : 512) + 2 * lane[r];
        memcpy(scale, stored, 2);
        if (p->kind == Q4_1) memcpy(scale + 32, stored + 2, 2);
        if (p->kind == Q4_0) { /* whose numbers count from -8 */
            uint16_t halves[LANES] = {0};
            memcpy(halves, stored, 2);
            store_half(halves, load_half(halves) * -8.0f);
            memcpy(scale + 32, halves, 2);
        }
    }
}

/* Sixteen rows. */
static void pack_item(void *args, int32_t item) {
    const Pack *p = args;
    const int64_t bytes = p->bits == 4 ? 320 : 544;
    const int from = item * LANES, rows = p->n - from < LANES ? p->n - from : LANES;
    uint8_t *tile[LANES];
    int lane[LANES];
    for (int r = 0; r < rows; r++) {
        const int64_t row = p->first + from + r;
        tile[r] = p->blocks + (row / LANES * p->step + p->shift) * p->groups * bytes;
        lane[r] = row % LANES;
    }
    for (int g = 0; g < p->groups; g++) {
        if (p->kind == Q4_0 || p->kind == Q4_1 || p->kind == Q8_0)
            copy_rows(p, from, rows, g, tile, lane);
        else
            round_rows(p, from, rows, g, tile, lane);
        for (int r = 0; r < rows; r++) tile[r] += bytes;
    }
}

void pack(const Pack *p, int32_t threads) { parallel(pack_item, (void *)p, (p->n + LANES - 1) / LANES, threads); }
