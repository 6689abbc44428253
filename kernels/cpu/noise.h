/* Counter-based noise, as kernels/noise.py defines it: Philox-4x32-10 keyed by a request's seed.
 *
 * Counter: (token / 4, position, purpose, 0); token % 4 picks one of the four numbers.
 */
#ifndef DRAFTSMITH_NOISE_H
#define DRAFTSMITH_NOISE_H

#include <math.h>

#include "vectors.h"

#define MAX_GUMBEL 22.9 /* the largest noise there can be, rounded up */
#define TWO_TO_32 4294967296.0

/* One request's stream at one position. */
struct stream {
    uint64_t seed;
    uint32_t position, purpose;
};

/* The 32 bits of eight tokens, each in the low half of its lane; one Philox is made a token. */
INLINE __m512i noise_bits(struct stream s, __m512i tokens) {
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), lane = _mm512_and_si512(tokens, _mm512_set1_epi64(3));
    uint32_t k0 = (uint32_t)s.seed, k1 = (uint32_t)(s.seed >> 32);
    __m512i c0 = _mm512_srli_epi64(tokens, 2), c1 = _mm512_set1_epi64(s.position);
    __m512i c2 = _mm512_set1_epi64(s.purpose), c3 = _mm512_setzero_si512();
    for (int round = 0; round < 10; round++) { /* products read low halves only: what lies above does not matter */
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), _mm512_set1_epi64(k0));
        c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), _mm512_set1_epi64(k1));
        c1 = p1, c3 = p0;
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    __m512i bits = c0;
    bits = _mm512_mask_mov_epi64(bits, _mm512_cmpeq_epi64_mask(lane, _mm512_set1_epi64(1)), c1);
    bits = _mm512_mask_mov_epi64(bits, _mm512_cmpeq_epi64_mask(lane, _mm512_set1_epi64(2)), c2);
    bits = _mm512_mask_mov_epi64(bits, _mm512_cmpeq_epi64_mask(lane, _mm512_set1_epi64(3)), c3);
    return _mm512_and_si512(bits, low);
}

/* Standard Gumbel noise of these bits: -log(-log(u)), u in (0, 1). */
INLINE double gumbel_of(uint64_t bits) { return -log(-log(((double)bits + 0.5) / TWO_TO_32)); }

/* Noise of one token. */
static double gumbel_at(struct stream s, int64_t token) {
    return gumbel_of((uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(noise_bits(s, _mm512_set1_epi64(token)))));
}

#endif
