// The few vector operations that the kernels need, for the instruction set this file is compiled for.
//
// Lanes hold output rows, or batch rows in panels. A *quad* is four consecutive inputs, repeated over the whole register; `pick` chooses one of the four for each
// lane.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define K24_INLINE inline __attribute__((always_inline))

namespace K24_ISA {

#if defined(__AVX512F__)

constexpr int LANES = 16;
// Blocks that fill the 32 registers: tiles times batch rows, and the sums of a panel.
constexpr int FEW_ROWS_TILES = 4, PACKED_TILES = 2, PACKED_ROWS = 8, DENSE_TILES = 4, DENSE_ROWS = 6, PANEL_SUMS = 16;
using F = __m512;
using I = __m512i;

K24_INLINE F load(const float* p) { return _mm512_load_ps(p); }
K24_INLINE F loadu(const float* p) { return _mm512_loadu_ps(p); }
K24_INLINE I load(const uint32_t* p) { return _mm512_load_si512(p); }
K24_INLINE void storeu(float* p, F v) { _mm512_storeu_ps(p, v); }
K24_INLINE void store(float* p, F v) { _mm512_store_ps(p, v); }
K24_INLINE F load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
K24_INLINE void store_some(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
K24_INLINE F zero() { return _mm512_setzero_ps(); }
K24_INLINE F all(float v) { return _mm512_set1_ps(v); }
K24_INLINE I quad(const uint32_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <int K>
K24_INLINE F splat(F quad) {
  return _mm512_permute_ps(quad, K * 0x55);
}
K24_INLINE F quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
K24_INLINE F pick(F quad, I which) { return _mm512_permutevar_ps(quad, which); }
template <int BITS>
K24_INLINE I shift_right(I v) {
  return _mm512_srli_epi32(v, BITS);
}
K24_INLINE F low_half(I pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
K24_INLINE F high_half(I pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }
K24_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
K24_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
K24_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
K24_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
K24_INLINE F rough_inverse(F v) { return _mm512_rcp14_ps(v); }
K24_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
K24_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
K24_INLINE F keep(F v, I bits, int which) {  // v where a lane's bit is set, else 0
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(1u << which))), v);
}
K24_INLINE F nearest(F v) { return _mm512_roundscale_ps(v, 0); }
K24_INLINE F power_of_two(F n) {  // n whole, from -126 to 127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

// Columns of a square block become rows.
K24_INLINE void transpose(F (&r)[LANES]) {
  F t[LANES];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + k + 2]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int half = 0; half < 16; half += 8)
    for (int i = half; i < half + 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
// Blocks that fill the 16 registers.
constexpr int FEW_ROWS_TILES = 4, PACKED_TILES = 1, PACKED_ROWS = 8, DENSE_TILES = 2, DENSE_ROWS = 6, PANEL_SUMS = 8;
using F = __m256;
using I = __m256i;

K24_INLINE F load(const float* p) { return _mm256_load_ps(p); }
K24_INLINE F loadu(const float* p) { return _mm256_loadu_ps(p); }
K24_INLINE I load(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
K24_INLINE void storeu(float* p, F v) { _mm256_storeu_ps(p, v); }
K24_INLINE void store(float* p, F v) { _mm256_store_ps(p, v); }
K24_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
K24_INLINE F load_some(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
K24_INLINE void store_some(float* p, F v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
K24_INLINE F zero() { return _mm256_setzero_ps(); }
K24_INLINE F all(float v) { return _mm256_set1_ps(v); }
K24_INLINE I quad(const uint32_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <int K>
K24_INLINE F splat(F quad) {
  return _mm256_permute_ps(quad, K * 0x55);
}
K24_INLINE F quad(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
K24_INLINE F pick(F quad, I which) { return _mm256_permutevar_ps(quad, which); }
template <int BITS>
K24_INLINE I shift_right(I v) {
  return _mm256_srli_epi32(v, BITS);
}
K24_INLINE F low_half(I pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); }
K24_INLINE F high_half(I pair) { return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))); }
K24_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
K24_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
K24_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
K24_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
K24_INLINE F rough_inverse(F v) { return _mm256_rcp_ps(v); }
K24_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
K24_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
K24_INLINE F keep(F v, I bits, int which) {
  const I bit = _mm256_set1_epi32(static_cast<int>(1u << which));
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit)));
}
K24_INLINE F nearest(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
K24_INLINE F power_of_two(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

K24_INLINE void transpose(F (&r)[LANES]) {
  F t[LANES];
  for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m256d a = _mm256_castps_pd(t[i + k]), b = _mm256_castps_pd(t[i + k + 2]);
      r[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#endif

// exp by Cody-Waite reduction and a Taylor polynomial of degree 6 on [-ln2/2, ln2/2]: relative error below 3e-7.
K24_INLINE F exp(F x) {
  x = min(all(88.0f), max(all(-87.0f), x));  // in this order NaN passes through
  const F n = nearest(mul(x, all(1.4426950408889634f)));
  F r = fma(n, all(-0.693145751953125f), x);  // ln2 in two parts, the first with trailing zeros
  r = fma(n, all(-1.428606765330187e-06f), r);
  F p = all(1.0f / 720);
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return mul(p, power_of_two(n));
}

// 1 / (1 + exp(-x)), the division as an estimate and one step of Newton's method: relative error below 4e-7.
K24_INLINE F sigmoid(F x) {
  const F d = add(all(1.0f), exp(sub(zero(), x)));
  const F r = rough_inverse(d);
  return mul(r, sub(all(2.0f), mul(d, r)));
}
K24_INLINE F tanh(F x) { return sub(mul(all(2.0f), sigmoid(mul(all(2.0f), x))), all(1.0f)); }

}  // namespace K24_ISA
