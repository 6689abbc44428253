/* Sixteen float32 lanes, and the ways weights and caches are turned into them. */
#ifndef DRAFTSMITH_VECTORS_H
#define DRAFTSMITH_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* How numbers are stored; the same values stand in kernels/cpu/packing.py. */
enum format { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

INLINE __m512 from_bfloat16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE __m256i to_bfloat16(__m512 x) {
    /* Rounds to nearest even; a NaN stays one, whatever its payload. */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __m512 load_stored(const void *data, size_t index, int format) {
    if (format == BFLOAT16)
        return from_bfloat16(_mm256_loadu_si256((const __m256i *)((const uint16_t *)data + index)));
    return _mm512_loadu_ps((const float *)data + index);
}

INLINE void store_as(void *data, size_t index, __m512 x, int format) {
    if (format == BFLOAT16)
        _mm256_storeu_si256((__m256i *)((uint16_t *)data + index), to_bfloat16(x));
    else
        _mm512_storeu_ps((float *)data + index, x);
}

/* e^x by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients), about one unit in the last
   place.  x is held to [-87, 88], so that results are normal numbers; a NaN stays one. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x)); /* NaN is the second operand */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

#endif
