/* All a draft model does in a round, in one call: read what is missing, then draft token after token.
 *
 * Rows are those of plain requests: greedy, or with a temperature and the noise of noise.h.  A request whose
 * `gammas` is 0 reads and drafts nothing; of its last row only the log-sum-exp is returned, which says whether all
 * is well.  Called through kernels/cpu/drafting.py.
 */
#include <omp.h>
#include <string.h>

#include "llama.h"
#include "noise.h"
#include "rows.h"

/* What drafting needs besides the layers. */
struct scorer {
    struct matrix head;
    const void *embedding;    /* [vocabulary, hidden] */
    const int64_t *token_ids; /* [columns], ascending, or NULL where column i is token i */
    int32_t embedding_format; /* BFLOAT16: states and logits are rounded to it, as such a model's are */
    int32_t columns;          /* of the head's outputs that may be drafted, from the first */
    int32_t vocabulary;
};

struct drafting {
    const int64_t *tokens;                  /* [sum of reads]: what the first forward reads, request after request */
    const int32_t *starts, *reads, *gammas; /* [requests]: position of the first of them, how many, how many to draft */
    const int32_t *tables;                  /* [requests, width]: block numbers */
    const float *temperatures;              /* [requests]; 0 is greedy */
    const uint64_t *seeds;                  /* [requests] */
    const float *cos, *sin;                 /* as in `batch` */
    void *const *keys, *const *values;
    int64_t *drafted;          /* [requests, most]: tokens, out */
    float *log_probs, *totals; /* [requests, most]: of the drafted at temperature 1, and log-sum-exp, out */
    int32_t requests, width, most, read, longest, blocks, block_tokens, cache_format, purpose;
};

struct work {
    float *x, *logits, *scores, *layers; /* scores: candidates' logits, a row a request */
    int64_t *positions, *slots, *wanted;
    int32_t *rows, *columns, *active; /* columns: candidates' */
};

static size_t up(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Candidates a row has room for: whole vectors, as the last one is written in full. */
static size_t room_of(const struct scorer *s) { return up((size_t)s->head.outputs * 4) / 4; }

static struct batch batch_of(const struct drafting *d, const struct work *w, int tokens, int wanted) {
    return (struct batch){
        .positions = w->positions, .slots = w->slots, .requests = w->rows, .tables = d->tables, .wanted = w->wanted,
        .cos = d->cos, .sin = d->sin, .keys = d->keys, .values = d->values, .tokens = tokens, .width = d->width,
        .num_wanted = wanted, .longest = d->longest, .block_tokens = d->block_tokens, .cache_format = d->cache_format,
    };
}

/* Share memory out, or only count its bytes where there is none. */
static size_t lay_out(const struct model *m, const struct scorer *s, const struct drafting *d, char *memory,
                      int threads, struct work *w) {
    const size_t tokens = d->read, requests = d->requests, row = (size_t)s->head.outputs * 4;
    size_t at = 0;
#define PLACE(field, bytes) w->field = (void *)(memory + at), at += up(bytes)
    PLACE(x, tokens * m->hidden * 4);
    PLACE(logits, requests * row);
    PLACE(scores, requests * room_of(s) * 4);
    PLACE(columns, requests * room_of(s) * 4);
    PLACE(positions, tokens * 8);
    PLACE(slots, tokens * 8);
    PLACE(rows, tokens * 4);
    PLACE(wanted, requests * 8);
    PLACE(active, requests * 4);
    const struct batch first = batch_of(d, w, d->read, d->requests);
    PLACE(layers, llama_scratch(m, &first, threads) * 4);
#undef PLACE
    return at;
}

/* Put a token's embedding and its place into row `i` of the next forward. */
static void place(const struct model *m, const struct scorer *s, const struct drafting *d, struct work *w, int i,
                  int request, int64_t token, int64_t position) {
    float *x = w->x + (size_t)i * m->hidden;
    const size_t from = (size_t)token * m->hidden;
    if (s->embedding_format == BFLOAT16) {
        const uint16_t *stored = (const uint16_t *)s->embedding + from;
        uint32_t *bits = (uint32_t *)x;
        for (int n = 0; n < m->hidden; n++) bits[n] = (uint32_t)stored[n] << 16;
    } else {
        memcpy(x, (const float *)s->embedding + from, (size_t)m->hidden * 4);
    }
    const int32_t *table = d->tables + (size_t)request * d->width;
    w->positions[i] = position;
    w->slots[i] = (int64_t)table[position / d->block_tokens] * d->block_tokens + position % d->block_tokens;
    w->rows[i] = request;
}

/* Lay out the first forward, whose rows are wanted where a request's part of it ends; return its tokens. */
static int place_missing(const struct model *m, const struct scorer *s, const struct drafting *d, struct work *w) {
    int at = 0;
    for (int r = 0; r < d->requests; r++) {
        for (int i = 0; i < d->reads[r]; i++, at++) place(m, s, d, w, at, r, d->tokens[at], (int64_t)d->starts[r] + i);
        w->wanted[r] = at - 1;
        w->active[r] = r;
    }
    return at;
}

static void round_to_bfloat16(float *x, int n) {
    for (int i = 0; i < n; i += LANES) {
        const __mmask16 mask = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        const __m256i half = to_bfloat16(_mm512_maskz_loadu_ps(mask, x + i));
        _mm512_mask_storeu_ps(x + i, mask, from_bfloat16(half));
    }
}

/* Keep the columns that noise could still lift above `reached`; return how many. */
static int candidates(const float *logits, int columns, float temperature, float reached, float *scores,
                      int32_t *kept) {
    const __m512 divisor = _mm512_set1_ps(temperature), border = _mm512_set1_ps(reached);
    __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int count = 0;
    for (int i = 0; i < columns; i += LANES, column = _mm512_add_epi32(column, _mm512_set1_epi32(LANES))) {
        const __mmask16 mask = columns - i >= LANES ? 0xffff : (__mmask16)((1u << (columns - i)) - 1);
        const __m512 scaled = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, logits + i), divisor);
        const __mmask16 near = _mm512_mask_cmp_ps_mask(mask, scaled, border, _CMP_GE_OQ);
        _mm512_storeu_ps(scores + count, _mm512_maskz_compress_ps(near, scaled)); /* never beyond i + LANES */
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(near, column));
        count += __builtin_popcount(near);
    }
    return count;
}

INLINE __m512i token_of(const int64_t *token_ids, __m256i columns, __mmask8 mask) {
    if (!token_ids) return _mm512_maskz_cvtepi32_epi64(mask, columns);
    return _mm512_mask_i32gather_epi64(_mm512_setzero_si512(), mask, columns, token_ids, 8);
}

/* Column of the largest logit / temperature + noise, of equal ones the first; `likeliest` has the largest logit. */
static int64_t draw(const float *logits, const struct scorer *s, float temperature, struct stream stream,
                    int64_t likeliest, float *scores, int32_t *kept) {
    const int64_t first = s->token_ids ? s->token_ids[likeliest] : likeliest;
    int64_t chosen = likeliest;
    double best = (double)(logits[likeliest] / temperature) + gumbel_at(stream, first);
    if (!isfinite(best)) return likeliest;
    const int count = candidates(logits, s->columns, temperature, (float)(best - MAX_GUMBEL) - 1e-3f, scores, kept);
    for (int i = 0; i < count; i += 8) {
        const __mmask8 mask = count - i >= 8 ? 0xff : (__mmask8)((1u << (count - i)) - 1);
        const __m256i columns = _mm256_maskz_loadu_epi32(mask, kept + i);
        const __m512i bits = noise_bits(stream, token_of(s->token_ids, columns, mask));
        /* g > best - score needs 1 - u < e^(score - best), as -log u >= 1 - u: one exponential instead of two logs. */
        const __m256 above = _mm512_cvtepu64_ps(_mm512_sub_epi64(_mm512_set1_epi64(1ll << 32), bits));
        const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(_mm512_castps256_ps512(above), _mm512_set1_ps(0.5f)),
                                          _mm512_set1_ps((float)(1 / TWO_TO_32)));
        const __m512 score = _mm512_maskz_loadu_ps(mask, scores + i);
        const __m512 odds = exponential(_mm512_sub_ps(score, _mm512_set1_ps((float)best)));
        const __m512 most = _mm512_mul_ps(odds, _mm512_set1_ps(1.001f)); /* whatever was rounded */
        __mmask8 left = mask & (__mmask8)_mm512_cmp_ps_mask(rest, most, _CMP_LE_OQ);
        uint64_t each[8];
        _mm512_storeu_si512(each, bits);
        for (; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            const double reached = (double)scores[i + lane] + gumbel_of(each[lane]);
            if (reached > best || (reached == best && kept[i + lane] < chosen)) best = reached, chosen = kept[i + lane];
        }
    }
    return chosen;
}

/* Draw the next token of row `i`, and note how likely it was. */
static void draw_row(const struct scorer *s, const struct drafting *d, const struct work *w, int i, int step) {
    const int request = w->active[i];
    const size_t out = (size_t)request * d->most + step, room = (size_t)request * room_of(s);
    float *logits = w->logits + (size_t)i * s->head.outputs;
    if (s->embedding_format == BFLOAT16) round_to_bfloat16(logits, s->columns);
    int64_t column = place_of_largest(logits, s->columns);
    d->totals[out] = log_sum(logits, s->columns, logits[column]);
    if (step >= d->gammas[request]) return;
    if (d->temperatures[request] > 0) {
        const uint32_t position = (uint32_t)(d->starts[request] + d->reads[request] + step);
        const struct stream stream = {d->seeds[request], position, (uint32_t)d->purpose};
        column = draw(logits, s, d->temperatures[request], stream, column, w->scores + room, w->columns + room);
    }
    d->log_probs[out] = logits[column] - d->totals[out];
    d->drafted[out] = s->token_ids ? s->token_ids[column] : column;
}

/* Score the states of the active rows and draw from them. */
static void score(const struct scorer *s, const struct drafting *d, const struct work *w, int hidden, int rows,
                  int step, int threads) {
#pragma omp parallel num_threads(threads)
    {
        if (s->embedding_format == BFLOAT16) {
#pragma omp for
            for (int i = 0; i < rows; i++) round_to_bfloat16(w->x + (size_t)i * hidden, hidden);
        }
        product(&s->head, w->x, rows, w->logits, 0, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
#pragma omp for schedule(static, 1)
        for (int i = 0; i < rows; i++) draw_row(s, d, w, i, step);
    }
}

/* Bytes of working memory that `draft` needs. */
size_t draft_scratch(const struct model *m, const struct scorer *s, const struct drafting *d, int threads) {
    struct work w;
    return lay_out(m, s, d, (char *)64, threads, &w); /* only places are computed */
}

/* Whether all tokens and blocks exist. */
static int exist(const struct scorer *s, const struct drafting *d) {
    for (int i = 0; i < d->read; i++)
        if (d->tokens[i] < 0 || d->tokens[i] >= s->vocabulary) return 0;
    for (int i = 0; i < d->requests * d->width; i++)
        if (d->tables[i] < 0 || d->tables[i] >= d->blocks) return 0;
    return 1;
}

/* Read and draft, or do nothing and return 0 where a token or block does not exist.
   memory: `draft_scratch` bytes; threads: of the first forward and of later ones. */
int draft(const struct model *m, const struct scorer *s, const struct drafting *d, void *memory, int first_threads,
          int later_threads) {
    struct work w;
    if (!exist(s, d)) return 0;
    lay_out(m, s, d, memory, first_threads > later_threads ? first_threads : later_threads, &w);
    int tokens = place_missing(m, s, d, &w), rows = d->requests;
    for (int step = 0; rows; step++) {
        const int threads = step ? later_threads : first_threads;
        const struct batch b = batch_of(d, &w, tokens, rows);
        llama_states(m, &b, w.x, w.layers, threads);
        score(s, d, &w, m->hidden, rows, step, threads);
        tokens = 0;
        for (int i = 0; i < rows; i++) {
            const int r = w.active[i];
            if (step + 1 >= d->gammas[r]) continue; /* it has its tokens; the last one is read by the next round */
            w.active[tokens] = r, w.wanted[tokens] = tokens;
            const int64_t token = d->drafted[(size_t)r * d->most + step];
            place(m, s, d, &w, tokens, r, token, (int64_t)d->starts[r] + d->reads[r] + step);
            tokens++;
        }
        rows = tokens;
    }
    return 1;
}
