/* y = x Wᵀ + b for few rows, over weights laid out in panels of 32 outputs.
 *
 * A panel holds, input after input, the 32 weights of that input, so one broadcast of x meets two
 * vectors of weights.  INT8 and INT4 keep 32 inputs as a block behind its 32 scales (and 32 offsets),
 * one an output.  A stored weight is expanded to the very float32 it stands for, and every output adds
 * its products up in one fixed order, so a row's result depends neither on the format nor on how many
 * rows come along.  Sums are taken over CHUNK inputs at a time: single huge inputs, which some models
 * have, then cost the other products no digits.
 */
#ifndef DRAFTSMITH_LINEAR_H
#define DRAFTSMITH_LINEAR_H

#include "vectors.h"

#define PANEL 32       /* outputs */
#define BLOCK 32       /* inputs that share a scale */
#define CHUNK 128      /* inputs added up in one go */
#define TILE 12        /* rows at a time: 24 sums and 2 weights fill the registers */
#define AT_ONCE 4      /* panels side by side, at most */
#define GROUP 96       /* rows that share an expanded chunk */
#define PREFETCH 2048  /* bytes ahead: a hardware prefetcher stops at each page */

struct matrix {
    const void *panels;
    const float *bias; /* [outputs], or NULL */
    int32_t outputs, inputs, format;
};

/* Bytes of one block of inputs in a panel; FLOAT32 and BFLOAT16 need no blocks but are cut alike. */
INLINE size_t block_bytes(int format) {
    switch (format) {
    case FLOAT32: return BLOCK * PANEL * 4;
    case BFLOAT16: return BLOCK * PANEL * 2;
    case INT8: return PANEL * 2 + BLOCK * PANEL;
    default: return PANEL * 4 + BLOCK * PANEL / 2;
    }
}

struct scales {
    __m512 scale[2], offset[2];
};

INLINE struct scales load_scales(const uint8_t *block, int format) {
    struct scales s;
    for (int half = 0; half < 2; half++) {
        s.scale[half] = s.offset[half] = _mm512_setzero_ps();
        if (format == INT8 || format == INT4)
            s.scale[half] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block + half));
        if (format == INT4)
            s.offset[half] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)block + 2 + half));
    }
    return s;
}

/* The 32 weights of input k of a block. */
INLINE void load_weights(const uint8_t *block, int k, int format, const struct scales *s, __m512 w[2]) {
    if (format == FLOAT32) {
        w[0] = _mm512_loadu_ps((const float *)block + k * PANEL);
        w[1] = _mm512_loadu_ps((const float *)block + k * PANEL + LANES);
    } else if (format == BFLOAT16) {
        w[0] = from_bfloat16(_mm256_loadu_si256((const __m256i *)block + 2 * k));
        w[1] = from_bfloat16(_mm256_loadu_si256((const __m256i *)block + 2 * k + 1));
    } else if (format == INT8) {
        const __m128i *q = (const __m128i *)(block + PANEL * 2) + 2 * k;
        w[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q))), s->scale[0]);
        w[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q + 1))), s->scale[1]);
    } else {
        /* Low halves of 16 bytes are outputs 0 to 15, high halves 16 to 31. */
        __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(block + PANEL * 4) + k));
        __m512i low = _mm512_and_si512(q, _mm512_set1_epi32(15)), high = _mm512_srli_epi32(q, 4);
        w[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), s->scale[0], s->offset[0]);
        w[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), s->scale[1], s->offset[1]);
    }
}

/* total[panel][row][32] += the products of `count` inputs, of panels that lie `pitch` bytes apart. */
INLINE void multiply(const int rows, const int panels, const int format, const uint8_t *panel, size_t pitch,
                     const float *x, size_t stride, int count, float *total, size_t total_pitch) {
    __m512 sum[TILE][2]; /* row after row of a panel */
    struct scales s[AT_ONCE];
#pragma GCC unroll 12
    for (int i = 0; i < rows * panels; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int first = 0; first < count; first += BLOCK, panel += block_bytes(format)) {
        const int inside = count - first < BLOCK ? count - first : BLOCK;
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) s[p] = load_scales(panel + p * pitch, format);
        for (int k = 0; k < inside; k++) {
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) {
                __m512 w[2];
                const uint8_t *block = panel + p * pitch;
                _mm_prefetch((const char *)block + PREFETCH + k * (block_bytes(format) / BLOCK), _MM_HINT_T0);
                load_weights(block, k, format, &s[p], w);
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++) {
                    const __m512 value = _mm512_set1_ps(x[r * stride + first + k]);
                    sum[p * rows + r][0] = _mm512_fmadd_ps(value, w[0], sum[p * rows + r][0]);
                    sum[p * rows + r][1] = _mm512_fmadd_ps(value, w[1], sum[p * rows + r][1]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++) {
                float *to = total + p * total_pitch + r * PANEL + half * LANES;
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[p * rows + r][half]));
            }
}

#define ROWS_CASE(n)                                                                       \
    case n:                                                                                \
        multiply(n, 1, format, panel, pitch, x, stride, count, total, total_pitch);        \
        break;
#define WIDE_CASE(n, wide)                                                                 \
    case n:                                                                                \
        if (panels == wide)                                                                \
            multiply(n, wide, format, panel, pitch, x, stride, count, total, total_pitch); \
        else                                                                               \
            multiply(n, 1, format, panel, pitch, x, stride, count, total, total_pitch);    \
        break;

INLINE void multiply_rows(int rows, int panels, const int format, const uint8_t *panel, size_t pitch, const float *x,
                          size_t stride, int count, float *total, size_t total_pitch) {
    switch (rows) {
        WIDE_CASE(1, AT_ONCE) WIDE_CASE(2, AT_ONCE) WIDE_CASE(3, AT_ONCE / 2) WIDE_CASE(4, AT_ONCE / 2)
        ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10) ROWS_CASE(11) ROWS_CASE(12)
    }
}

#define FORMAT_FUNCTION(name, format)                                                                              \
    static __attribute__((noinline)) void name(int rows, int panels, const uint8_t *panel, size_t pitch,           \
                                               const float *x, size_t stride, int count, float *total,             \
                                               size_t total_pitch) {                                               \
        multiply_rows(rows, panels, format, panel, pitch, x, stride, count, total, total_pitch);                   \
    }
FORMAT_FUNCTION(multiply_float32, FLOAT32)
FORMAT_FUNCTION(multiply_bfloat16, BFLOAT16)
FORMAT_FUNCTION(multiply_int8, INT8)
FORMAT_FUNCTION(multiply_int4, INT4)

typedef void (*multiply_function)(int, int, const uint8_t *, size_t, const float *, size_t, int, float *, size_t);
static const multiply_function multiply_stored[] = {multiply_float32, multiply_bfloat16, multiply_int8, multiply_int4};

static void expand(const uint8_t *panel, int format, int count, float *out) {
    for (int first = 0; first < count; first += BLOCK, panel += block_bytes(format)) {
        const struct scales s = load_scales(panel, format);
        for (int k = 0; k < BLOCK && first + k < count; k++) {
            __m512 w[2];
            load_weights(panel, k, format, &s, w);
            _mm512_storeu_ps(out + (first + k) * PANEL, w[0]);
            _mm512_storeu_ps(out + (first + k) * PANEL + LANES, w[1]);
        }
    }
}

/* How many panels to multiply side by side.  A sum waits four cycles for its last addition and two are done in each,
   so with fewer than eight sums, which one panel has up to three rows, the units wait. */
INLINE int panels_at_once(int rows) { return rows <= 2 ? AT_ONCE : rows <= 4 ? AT_ONCE / 2 : 1; }

/* Outputs of up to GROUP rows, without bias, into total[panel][row][32]; panels: `panels_at_once` or 1. */
static void panel_product(const struct matrix *m, int panel, int panels, const float *x, size_t stride, int rows,
                          float *total) {
    float expanded[CHUNK * PANEL] __attribute__((aligned(64)));
    const size_t chunk_bytes = block_bytes(m->format) * (CHUNK / BLOCK);
    const int blocks = (m->inputs + BLOCK - 1) / BLOCK;
    const uint8_t *at = (const uint8_t *)m->panels + (size_t)panel * blocks * block_bytes(m->format);
    const int tiles = (rows + TILE - 1) / TILE;
    const int expands = tiles > 3 && m->format != FLOAT32; /* from here on expanding once is cheaper */
    const size_t pitch = blocks * block_bytes(m->format), total_pitch = (size_t)rows * PANEL;
    for (int i = 0; i < panels * rows * PANEL; i += LANES) _mm512_store_ps(total + i, _mm512_setzero_ps());
    for (int first = 0; first < m->inputs; first += CHUNK, at += chunk_bytes) {
        const int count = m->inputs - first < CHUNK ? m->inputs - first : CHUNK;
        if (expands) expand(at, m->format, count, expanded);
        const multiply_function function = expands ? multiply_float32 : multiply_stored[m->format];
        const uint8_t *weights = expands ? (const uint8_t *)expanded : at;
        for (int tile = 0; tile < tiles; tile++) { /* of nearly equal size */
            const int from = (int)((int64_t)rows * tile / tiles), to = (int)((int64_t)rows * (tile + 1) / tiles);
            function(to - from, panels, weights, pitch, x + from * stride + first, stride, count, total + from * PANEL,
                     total_pitch);
        }
    }
}

/* This thread's share of y = x Wᵀ + b, or of y += x Wᵀ + b.  Shapes: x [rows, inputs], y [rows, outputs]. */
static void product(const struct matrix *m, const float *x, int rows, float *y, int add, int thread, int threads) {
    float total[GROUP * PANEL] __attribute__((aligned(64)));
    const int panels = (m->outputs + PANEL - 1) / PANEL;
    const int begin = (int)((int64_t)panels * thread / threads), end = (int)((int64_t)panels * (thread + 1) / threads);
    const int wide = panels_at_once(rows);
    for (int panel = begin, taken; panel < end; panel += taken) {
        taken = end - panel >= wide ? wide : 1;
        for (int first = 0; first < rows; first += GROUP) {
            const int count = rows - first < GROUP ? rows - first : GROUP;
            panel_product(m, panel, taken, x + (size_t)first * m->inputs, m->inputs, count, total);
            for (int half = 0; half < 2 * taken; half++) {
                const int column = panel * PANEL + half * LANES, left = m->outputs - column;
                if (left <= 0) continue;
                const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
                const __m512 bias = m->bias ? _mm512_maskz_loadu_ps(mask, m->bias + column) : _mm512_setzero_ps();
                const float *from = total + (size_t)(half / 2) * count * PANEL + half % 2 * LANES;
                for (int r = 0; r < count; r++) {
                    float *to = y + (size_t)(first + r) * m->outputs + column;
                    __m512 out = _mm512_add_ps(_mm512_load_ps(from + r * PANEL), bias);
                    if (add) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, to));
                    _mm512_mask_storeu_ps(to, mask, out);
                }
            }
        }
    }
}

#endif
