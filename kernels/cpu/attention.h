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

/* scores: room for the context, rounded up to LANES. */
INLINE void attend_head(const struct cache *c, const int dim, const int format, const int32_t *table, int length, int kv_head,
                        const float *query, float scale, float *scores, float *out) {
    enum { VECTORS = 16 }; /* of the largest head */
    const int vectors = dim / LANES;
    const size_t stride = (size_t)c->kv_heads * dim;
    __m512 q[VECTORS], sum[VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++)
        q[i] = _mm512_mul_ps(_mm512_loadu_ps(query + i * LANES), _mm512_set1_ps(scale));
    float peak = -INFINITY;
    for (int t = 0; t < length; t += c->block_tokens) {
        const int inside = length - t < c->block_tokens ? length - t : c->block_tokens;
        size_t at = (size_t)table[t / c->block_tokens] * c->block_tokens * stride + (size_t)kv_head * dim;
        for (int k = 0; k < inside; k++, at += stride) {
            __m512 s = _mm512_mul_ps(q[0], load_stored(c->keys, at, format));
#pragma GCC unroll 16
            for (int i = 1; i < vectors; i++) s = _mm512_fmadd_ps(q[i], load_stored(c->keys, at + i * LANES, format), s);
            const float score = _mm512_reduce_add_ps(s);
            scores[t + k] = score;
            peak = score > peak ? score : peak;
        }
    }
    const int padded = (length + LANES - 1) / LANES * LANES;
    for (int t = length; t < padded; t++) scores[t] = -INFINITY;
    __m512 mass = _mm512_setzero_ps();
    for (int t = 0; t < padded; t += LANES) {
        const __mmask16 mask = length - t >= LANES ? 0xffff : (__mmask16)((1u << (length - t)) - 1);
        const __m512 p = _mm512_maskz_mov_ps(
            mask, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(peak))));
        mass = _mm512_add_ps(mass, p);
        _mm512_storeu_ps(scores + t, p);
    }
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) sum[i] = _mm512_setzero_ps();
    for (int t = 0; t < length; t += c->block_tokens) {
        const int inside = length - t < c->block_tokens ? length - t : c->block_tokens;
        size_t at = (size_t)table[t / c->block_tokens] * c->block_tokens * stride + (size_t)kv_head * dim;
        for (int k = 0; k < inside; k++, at += stride) {
            const __m512 p = _mm512_set1_ps(scores[t + k]);
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++)
                sum[i] = _mm512_fmadd_ps(p, load_stored(c->values, at + i * LANES, format), sum[i]);
        }
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(mass));
#pragma GCC unroll 16
    for (int i = 0; i < vectors; i++) _mm512_storeu_ps(out + i * LANES, _mm512_mul_ps(sum[i], share));
}

#define HEAD_FUNCTION(name, dim, format)                                                                          \
    static __attribute__((noinline)) void name(const struct cache *c, const int32_t *table, int length, int kv_head, \
                                               const float *query, float scale, float *scores, float *out) {      \
        attend_head(c, dim, format, table, length, kv_head, query, scale, scores, out);                           \
    }
#define HEAD_FUNCTIONS(dim) HEAD_FUNCTION(attend_float32_##dim, dim, FLOAT32) HEAD_FUNCTION(attend_bfloat16_##dim, dim, BFLOAT16)
HEAD_FUNCTIONS(16) HEAD_FUNCTIONS(32) HEAD_FUNCTIONS(64) HEAD_FUNCTIONS(96) HEAD_FUNCTIONS(128) HEAD_FUNCTIONS(256)

typedef void (*head_function)(const struct cache *, const int32_t *, int, int, const float *, float, float *, float *);

#define HEAD_CASE(dim) \
    case dim: return c->format == BFLOAT16 ? attend_bfloat16_##dim : attend_float32_##dim;

static head_function head_function_of(const struct cache *c) {
    switch (c->dim) {
        HEAD_CASE(16) HEAD_CASE(32) HEAD_CASE(64) HEAD_CASE(96) HEAD_CASE(128)
        default: return c->format == BFLOAT16 ? attend_bfloat16_256 : attend_float32_256;
    }
}

#endif
