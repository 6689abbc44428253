/* Causal attention of new tokens over a paged cache, read where it lies.
 *
 * out = Σ_t softmax(scale · q·k_t) v_t over the positions 0 ... p of the token's own request, p its own.
 * Each (token, query head) is computed alone and in one order, so its result does not depend on the batch.
 * Caches are [slots, kv_heads, dim]; position t of a request lies at slot table[t / block] * block + t % block.
 */
#ifndef DRAFTSMITH_ATTENTION_H
#define DRAFTSMITH_ATTENTION_H

#include <math.h>

#include "vectors.h"

struct cache {
    void *keys, *values;
    int32_t kv_heads, dim, block_tokens, format;
};

/* A few query heads that share a key head, so that each key and value is loaded once for all of them.
   query and out [heads, dim]; scores: room for `heads` contexts, each rounded up to LANES. */
INLINE void attend(const struct cache *c, const int dim, const int format, const int heads, const int32_t *table, int length,
                   int kv_head, const float *query, float scale, float *scores, float *out) {
    enum { VECTORS = 16, HEADS = 4 }; /* of the largest */
    const int vectors = dim / LANES, padded = (length + LANES - 1) / LANES * LANES;
    const size_t stride = (size_t)c->kv_heads * dim;
    __m512 q[HEADS][VECTORS], sum[HEADS][VECTORS];
    float peak[HEADS];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        peak[h] = -INFINITY;
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++) {
            q[h][i] = _mm512_mul_ps(_mm512_loadu_ps(query + h * dim + i * LANES), _mm512_set1_ps(scale));
            sum[h][i] = _mm512_setzero_ps();
        }
    }
    for (int t = 0; t < length; t += c->block_tokens) {
        const int inside = length - t < c->block_tokens ? length - t : c->block_tokens;
        size_t at = (size_t)table[t / c->block_tokens] * c->block_tokens * stride + (size_t)kv_head * dim;
        for (int k = 0; k < inside; k++, at += stride) {
            __m512 s[HEADS];
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++) {
                const __m512 key = load_stored(c->keys, at + i * LANES, format);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++)
                    s[h] = i ? _mm512_fmadd_ps(q[h][i], key, s[h]) : _mm512_mul_ps(q[h][i], key);
            }
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                const float score = _mm512_reduce_add_ps(s[h]);
                scores[h * padded + t + k] = score;
                peak[h] = score > peak[h] ? score : peak[h];
            }
        }
    }
    __m512 share[HEADS];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        __m512 mass = _mm512_setzero_ps();
        for (int t = 0; t < padded; t += LANES) {
            const __mmask16 mask = length - t >= LANES ? 0xffff : (__mmask16)((1u << (length - t)) - 1);
            const __m512 score = _mm512_maskz_loadu_ps(mask, scores + h * padded + t);
            const __m512 p = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(score, _mm512_set1_ps(peak[h]))));
            mass = _mm512_add_ps(mass, p);
            _mm512_storeu_ps(scores + h * padded + t, p);
        }
        share[h] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(mass));
    }
    for (int t = 0; t < length; t += c->block_tokens) {
        const int inside = length - t < c->block_tokens ? length - t : c->block_tokens;
        size_t at = (size_t)table[t / c->block_tokens] * c->block_tokens * stride + (size_t)kv_head * dim;
        for (int k = 0; k < inside; k++, at += stride)
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++) {
                const __m512 value = load_stored(c->values, at + i * LANES, format);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++)
                    sum[h][i] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h * padded + t + k]), value, sum[h][i]);
            }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++)
            _mm512_storeu_ps(out + h * dim + i * LANES, _mm512_mul_ps(sum[h][i], share[h]));
}

typedef void (*attend_function)(const struct cache *, const int32_t *, int, int, const float *, float, float *, float *);

#define ATTEND(dim, format, heads)                                                                                   \
    static __attribute__((noinline)) void attend_##dim##_##format##_##heads(                                         \
        const struct cache *c, const int32_t *table, int length, int kv_head, const float *query, float scale,       \
        float *scores, float *out) {                                                                                 \
        attend(c, dim, format, heads, table, length, kv_head, query, scale, scores, out);                            \
    }
#define ATTEND_HEADS(dim, format) \
    ATTEND(dim, format, 1) ATTEND(dim, format, 2) ATTEND(dim, format, 3) ATTEND(dim, format, 4)
#define ATTEND_FORMATS(dim) ATTEND_HEADS(dim, FLOAT32) ATTEND_HEADS(dim, BFLOAT16)
ATTEND_FORMATS(16) ATTEND_FORMATS(32) ATTEND_FORMATS(64) ATTEND_FORMATS(96) ATTEND_FORMATS(128) ATTEND_FORMATS(256)

#define NAMES_OF(dim, format) \
    {attend_##dim##_##format##_1, attend_##dim##_##format##_2, attend_##dim##_##format##_3, attend_##dim##_##format##_4}
#define NAMES(dim) {NAMES_OF(dim, FLOAT32), NAMES_OF(dim, BFLOAT16)}

static attend_function attend_function_of(const struct cache *c, int heads) {
    static const int dims[] = {16, 32, 64, 96, 128, 256};
    static const attend_function functions[][2][4] = {NAMES(16), NAMES(32), NAMES(64), NAMES(96), NAMES(128), NAMES(256)};
    int i = 0;
    while (dims[i] != c->dim) i++;
    return functions[i][c->format == BFLOAT16][heads - 1];
}

/* How many heads at a time: their queries and sums must stay in registers. */
INLINE int heads_at_once(int dim) { return dim <= 64 ? 4 : dim <= 128 ? 2 : 1; }

#endif
