/* All layers of a Llama-shaped model over the new tokens of a batch, in one call.
 *
 * Activations are float32 throughout.  One parallel region runs from the first layer to the last; the
 * stages of a layer are parted by barriers.  Called through kernels/cpu/forward.py, and by draft.c.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "llama.h"

static float sum_of_squares(const float *x, int n) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += LANES) {
        const __mmask16 mask = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* out = x / sqrt(mean(x²) + epsilon) * weight; `out` may be `x`. */
static void norm(const float *x, const float *weight, float epsilon, int n, float *out) {
    const float factor = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + epsilon);
    for (int i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

/* Turn a head by its position: the halves change places, the table holds the sign. */
static void rotate(float *head, const float *cos, const float *sin, int dim) {
    const int half = dim / 2;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] + b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Norm, turn and store what one token brings: its queries stay in `qkv`, keys and values go to the cache. */
static void place_token(const struct model *m, const struct layer *l, const struct batch *b, const struct cache *c,
                        int token, float *qkv) {
    const int dim = m->dim, turning = m->heads + m->kv_heads;
    const float *cos = b->cos + b->positions[token] * dim, *sin = b->sin + b->positions[token] * dim;
    for (int head = 0; head < turning; head++) {
        if (l->head_norm) norm(qkv + head * dim, l->head_norm + head * dim, l->head_epsilon, dim, qkv + head * dim);
        rotate(qkv + head * dim, cos, sin, dim);
    }
    const size_t slot = (size_t)b->slots[token] * m->kv_heads * dim;
    for (int i = 0; i < m->kv_heads * dim; i += LANES) {
        store_as(c->keys, slot + i, _mm512_loadu_ps(qkv + m->heads * dim + i), c->format);
        store_as(c->values, slot + i, _mm512_loadu_ps(qkv + turning * dim + i), c->format);
    }
}

/* out = silu(gate) * up of one token, silu(z) = z / (1 + e^-z). */
static void gated(const float *gate_up, int ffn, float *out) {
    for (int i = 0; i < ffn; i += LANES) {
        const __mmask16 mask = ffn - i >= LANES ? 0xffff : (__mmask16)((1u << (ffn - i)) - 1);
        const __m512 gate = _mm512_maskz_loadu_ps(mask, gate_up + i), up = _mm512_maskz_loadu_ps(mask, gate_up + ffn + i);
        const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_div_ps(gate, below), up));
    }
}

static void attend_all(const struct model *m, const struct layer *l, const struct batch *b, const struct cache *c,
                       const float *qkv, float *scores, float *out, int team) {
    const int width = (m->heads + 2 * m->kv_heads) * m->dim, shared = m->heads / m->kv_heads;
    /* With little to share out, one head at a time keeps all threads busy. */
    const int most = b->tokens * m->kv_heads < 4 * team ? 1 : heads_at_once(m->dim);
    const int groups = (shared + most - 1) / most;
#pragma omp for schedule(dynamic, 3) /* contexts differ in length */
    for (int task = 0; task < b->tokens * m->kv_heads * groups; task++) {
        const int token = task / (m->kv_heads * groups), kv_head = task / groups % m->kv_heads, group = task % groups;
        const int first = shared * group / groups, heads = shared * (group + 1) / groups - first;
        const int head = kv_head * shared + first;
        attend_function_of(c, heads)(
            c, b->tables + (size_t)b->requests[token] * b->width, (int)b->positions[token] + 1, kv_head,
            qkv + (size_t)token * width + head * m->dim, l->scaling, scores,
            out + ((size_t)token * m->heads + head) * m->dim);
    }
}

/* Move the wanted rows of x [tokens, width] to its front; `spare` has room for them. */
static void gather(float *x, int width, const int64_t *wanted, int count, float *spare) {
    for (int i = 0; i < count; i++) memcpy(spare + (size_t)i * width, x + wanted[i] * width, (size_t)width * 4);
    memcpy(x, spare, (size_t)count * width * 4);
}

/* Floats of scratch memory that one thread's scores take: four heads at once, each rounded up. */
static size_t scores_room(const struct batch *b) { return 4 * ((size_t)b->longest + LANES); }

size_t llama_scratch(const struct model *m, const struct batch *b, int threads) {
    const size_t token = m->hidden + (m->heads + 2 * m->kv_heads) * m->dim + m->heads * m->dim + 3 * m->ffn;
    return b->tokens * token + (size_t)threads * scores_room(b);
}

void llama_states(const struct model *m, const struct batch *b, float *x, float *scratch, int threads) {
    const size_t tokens = b->tokens;
    const int hidden = m->hidden, width = (m->heads + 2 * m->kv_heads) * m->dim, attended_width = m->heads * m->dim;
    float *normed = scratch, *qkv = normed + tokens * hidden, *attended = qkv + tokens * width;
    float *gate_up = attended + tokens * attended_width, *inner = gate_up + tokens * 2 * m->ffn;
    float *scores = inner + tokens * m->ffn;
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        int rows = b->tokens;
        for (int n = 0; n < m->num_layers; n++) {
            const struct layer *l = m->layers + n;
            const struct cache c = {b->keys[n], b->values[n], m->kv_heads, m->dim, b->block_tokens, b->cache_format};
#pragma omp for
            for (int r = 0; r < rows; r++)
                norm(x + (size_t)r * hidden, l->input_norm, l->input_epsilon, hidden, normed + (size_t)r * hidden);
            product(&l->qkv, normed, rows, qkv, 0, thread, team);
#pragma omp barrier
#pragma omp for
            for (int r = 0; r < rows; r++) place_token(m, l, b, &c, r, qkv + (size_t)r * width);
            attend_all(m, l, b, &c, qkv, scores + (size_t)thread * scores_room(b), attended, team);
            if (n == m->num_layers - 1) { /* what no one asked for need not go on */
#pragma omp single
                {
                    gather(x, hidden, b->wanted, b->num_wanted, normed);
                    gather(attended, attended_width, b->wanted, b->num_wanted, qkv);
                }
                rows = b->num_wanted;
            }
            product(&l->output, attended, rows, x, 1, thread, team);
#pragma omp barrier
#pragma omp for
            for (int r = 0; r < rows; r++)
                norm(x + (size_t)r * hidden, l->mlp_norm, l->mlp_epsilon, hidden, normed + (size_t)r * hidden);
            product(&l->gate_up, normed, rows, gate_up, 0, thread, team);
#pragma omp barrier
#pragma omp for
            for (int r = 0; r < rows; r++) gated(gate_up + (size_t)r * 2 * m->ffn, m->ffn, inner + (size_t)r * m->ffn);
            product(&l->down, inner, rows, x, 1, thread, team);
#pragma omp barrier
        }
#pragma omp for
        for (int r = 0; r < rows; r++) norm(x + (size_t)r * hidden, m->norm, m->epsilon, hidden, x + (size_t)r * hidden);
    }
}

/* y = x Wᵀ + b.  Shapes: x [rows, inputs], y [rows, outputs]. */
void linear(const struct matrix *m, const float *x, float *y, int rows, int threads) {
#pragma omp parallel num_threads(threads)
    product(m, x, rows, y, 0, omp_get_thread_num(), omp_get_num_threads());
}
