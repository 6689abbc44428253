/* What a Llama-shaped model is, and what a step gives it.
 *
 * kernels/cpu/structures.py repeats the structures field by field.
 */
#ifndef DRAFTSMITH_LLAMA_H
#define DRAFTSMITH_LLAMA_H

#include "linear.h"

struct layer {
    struct matrix qkv, output, gate_up, down;
    const float *input_norm, *mlp_norm; /* [hidden] */
    const float *head_norm;             /* [heads + kv_heads, dim], or NULL where heads are not normed */
    float input_epsilon, head_epsilon, mlp_epsilon, scaling;
};

struct model {
    const struct layer *layers;
    const float *norm; /* [hidden] */
    float epsilon;
    int32_t num_layers, hidden, heads, kv_heads, dim, ffn;
};

struct batch {
    const int64_t *positions, *slots;  /* [tokens]: place in the request, place in the cache */
    const int32_t *requests;           /* [tokens]: row of `tables` */
    const int32_t *tables;             /* [requests, width]: block numbers */
    const int64_t *wanted;             /* [num_wanted]: tokens whose states are returned */
    const float *cos, *sin;            /* [positions, dim]; the sines' first half is negated */
    void *const *keys, *const *values; /* [layers] caches [slots, kv_heads, dim] */
    int32_t tokens, width, num_wanted, longest, block_tokens, cache_format;
};

/* Floats of scratch memory that `llama_states` needs. */
size_t llama_scratch(const struct model *m, const struct batch *b, int threads);

/* x [tokens, hidden]: embeddings in, normed states of the wanted tokens out, in its first rows. */
void llama_states(const struct model *m, const struct batch *b, float *x, float *scratch, int threads);

#endif
