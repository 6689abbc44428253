/* What a step wants to know of each row of logits, in as few passes as there can be.
 *
 * Rows are shared out to the threads; what is found in one depends on nothing outside it.  Called
 * through kernels/cpu/rows.py.
 */
#include <math.h>
#include <omp.h>

#include "rows.h"
#include "vectors.h"

#define SPAN 64 /* numbers whose largest is remembered, to look again only where it pays */

INLINE __mmask16 first_lanes(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Largest of x[0..count), count <= SPAN; NaNs are passed over here and counted in `nans`. */
INLINE float span_peak(const float *x, int64_t count, __mmask16 *nans) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 best = none;
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512 v = _mm512_mask_loadu_ps(none, first_lanes(count - i), x + i);
        *nans |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        best = _mm512_max_ps(v, best); /* where v is NaN the second operand is taken */
    }
    return _mm512_reduce_max_ps(best);
}

int64_t place_of_largest(const float *x, int64_t width) {
    const int64_t wide = 16 * SPAN;
    float best = -INFINITY;
    int64_t at = 0;
    __mmask16 nans = 0;
    for (int64_t first = 0; first < width; first += wide) {
        const int64_t end = first + wide < width ? first + wide : width;
        __m512 lanes[4] = {_mm512_set1_ps(best), _mm512_set1_ps(best), _mm512_set1_ps(best), _mm512_set1_ps(best)};
        int64_t i = first;
        for (; i + SPAN <= end; i += SPAN)
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                const __m512 v = _mm512_loadu_ps(x + i + part * LANES);
                nans |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
                lanes[part] = _mm512_max_ps(v, lanes[part]);
            }
        const float left = span_peak(x + i, end - i, &nans);
        float here = _mm512_reduce_max_ps(
            _mm512_max_ps(_mm512_max_ps(lanes[0], lanes[1]), _mm512_max_ps(lanes[2], lanes[3])));
        if (left > here) here = left;
        if (nans) {
            for (i = first; x[i] == x[i];) i++;
            return i;
        }
        if (here > best) best = here, at = first;
    }
    while (x[at] < best) at++; /* `at` began the stretch it is in */
    return at;
}

/* A heap of the k best so far, the worst on top: of equal ones the later is worse. */
struct entry {
    float value;
    int32_t id;
};

INLINE int worse(struct entry a, struct entry b) { return a.value < b.value || (a.value == b.value && a.id > b.id); }

static void sift(struct entry *heap, int count, int at) {
    const struct entry moved = heap[at];
    for (int child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && worse(heap[child + 1], heap[child])) child++;
        if (!worse(heap[child], moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* Put an entry in the place of the worst, if it is better. */
INLINE void offer(struct entry *heap, int k, float value, int32_t id) {
    const struct entry one = {value, id};
    if (!worse(heap[0], one)) return;
    heap[0] = one;
    sift(heap, k, 0);
}

static void clear(struct entry *heap, int k) {
    for (int i = 0; i < k; i++) heap[i] = (struct entry){-INFINITY, INT32_MAX};
}

INLINE __m512 add_exponentials(__m512 sum, const float *x, __mmask16 mask, __m512 largest) {
    const __m512 term = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x), largest));
    return _mm512_mask_add_ps(sum, mask, sum, term);
}

float log_sum(const float *x, int64_t width, float largest) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512 from = _mm512_set1_ps(largest);
    int64_t i = 0;
    for (; i + SPAN <= width; i += SPAN)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) sums[part] = add_exponentials(sums[part], x + i + part * LANES, 0xffff, from);
    for (; i < width; i += LANES) sums[0] = add_exponentials(sums[0], x + i, first_lanes(width - i), from);
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    return largest + logf(_mm512_reduce_add_ps(all));
}

/* The k largest of a row in falling order, of equal ones the first; peaks [spans] and heap [k] are scratch. */
static void top_of_row(const float *x, int64_t width, int k, float *peaks, struct entry *heap, float *log_probs,
                       int64_t *ids) {
    const int64_t spans = (width + SPAN - 1) / SPAN;
    float largest = -INFINITY;
    __mmask16 nans = 0;
    clear(heap, k);
    for (int64_t s = 0; s < spans; s++) {
        const int64_t left = width - s * SPAN;
        peaks[s] = span_peak(x + s * SPAN, left < SPAN ? left : SPAN, &nans);
        if (peaks[s] > largest) largest = peaks[s];
        offer(heap, k, peaks[s], (int32_t)s);
    }
    const float border = heap[0].value; /* k spans reach it, so nothing below is among the k largest */
    const float total = nans ? NAN : log_sum(x, width, largest);
    clear(heap, k);
    for (int64_t s = 0; s < spans; s++) {
        if (peaks[s] < border) continue;
        const int64_t end = (s + 1) * SPAN < width ? (s + 1) * SPAN : width;
        for (int64_t i = s * SPAN; i < end; i++) {
            const float value = x[i] == x[i] ? x[i] : -INFINITY; /* a NaN has a place, too */
            if (value >= border) offer(heap, k, value, (int32_t)i);
        }
    }
    for (int left = k; left > 0; left--) { /* the worst comes first, and goes last */
        log_probs[left - 1] = heap[0].value - total;
        ids[left - 1] = heap[0].id;
        heap[0] = heap[left - 1];
        sift(heap, left - 1, 0);
    }
}

/* Shapes: x [rows, width], values and places [rows]. */
void rows_largest(const float *x, int rows, int64_t width, float *values, int64_t *places, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        places[r] = place_of_largest(x + r * width, width);
        values[r] = x[r * width + places[r]];
    }
}

/* Floats of working memory that `rows_top` needs; an entry is as long as two. */
size_t rows_scratch(int64_t width, int k, int threads) {
    return (size_t)threads * (size_t)((width + SPAN - 1) / SPAN + 2 * (int64_t)k);
}

/* Shapes: x [rows, width], log_probs and ids [rows, k], k <= width. */
void rows_top(const float *x, int rows, int64_t width, int k, float *log_probs, int64_t *ids, float *scratch,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        struct entry *heap = (struct entry *)(scratch + omp_get_thread_num() * rows_scratch(width, k, 1));
        top_of_row(x + r * width, width, k, (float *)(heap + k), heap, log_probs + (int64_t)r * k, ids + (int64_t)r * k);
    }
}
