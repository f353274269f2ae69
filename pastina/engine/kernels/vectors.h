// Functions of sixteen numbers at a time.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, T tokens of a row, D size of an attention
// head, H hidden, I intermediate.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using Vec = __m512;

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline Vec exp_of(Vec x) {  // 2 ulp; below -87: 0
  const Vec log2e = _mm512_set1_ps(1.44269504088896341f);
  const Vec high = _mm512_set1_ps(0.693359375f), low = _mm512_set1_ps(-2.12194440e-4f);
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), x);  // in this order NaN stays
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
  const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec r = _mm512_fnmadd_ps(n, high, x);
  r = _mm512_fnmadd_ps(n, low, r);
  Vec p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), tiny, _mm512_setzero_ps());
}

// gelu(x) = x Phi(x) and its derivative Phi(x) + x phi(x); both need exp(-x^2 / 2).
// erf: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 (error 1.5e-7).
inline Vec gelu_of(Vec x, Vec& slope) {
  const Vec one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
  const Vec bell = exp_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f)));
  const Vec z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678118f));
  const Vec t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  Vec p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  // Phi(-|x|) = (1 - erf(z)) / 2
  const Vec tail = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(p, t), bell), half);
  const __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const Vec phi = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), is_negative, tail);
  slope = _mm512_fmadd_ps(_mm512_mul_ps(x, bell), _mm512_set1_ps(0.3989422804f), phi);
  return _mm512_mul_ps(x, phi);
}

// The form with tanh: x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), s the logistic function.
inline Vec gelu_tanh_of(Vec x, Vec& slope) {
  const Vec one = _mm512_set1_ps(1.0f), c = _mm512_set1_ps(1.5957691216f);
  const Vec square = _mm512_mul_ps(x, x);
  const Vec u = _mm512_mul_ps(_mm512_mul_ps(c, x), _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), one));
  const Vec s = _mm512_div_ps(one, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), u))));
  const Vec steep = _mm512_mul_ps(c, _mm512_fmadd_ps(square, _mm512_set1_ps(0.134145f), one));
  const Vec bend = _mm512_mul_ps(_mm512_mul_ps(s, _mm512_sub_ps(one, s)), steep);
  slope = _mm512_fmadd_ps(x, bend, s);
  return _mm512_mul_ps(x, s);
}

inline Vec relu_of(Vec x, Vec& slope) {
  const __mmask16 off = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LE_OQ);
  slope = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), off, _mm512_setzero_ps());
  return _mm512_mask_mov_ps(x, off, _mm512_setzero_ps());
}

inline Vec activation_of(int act, Vec x, Vec& slope) {
  return act == 0 ? gelu_of(x, slope) : act == 1 ? gelu_tanh_of(x, slope) : relu_of(x, slope);
}

// Numbers in [0, 1), others for each key.
struct Noise {
  __m512i state;
  explicit Noise(uint64_t key) {
    alignas(64) uint32_t start[16];
    for (int lane = 0; lane < 16; ++lane) {
      uint64_t z = key + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(lane + 1);
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
      start[lane] = static_cast<uint32_t>(z ^ (z >> 31)) | 1u;
    }
    state = _mm512_load_si512(start);
  }
  Vec next() {
    state = _mm512_xor_si512(state, _mm512_slli_epi32(state, 13));
    state = _mm512_xor_si512(state, _mm512_srli_epi32(state, 17));
    state = _mm512_xor_si512(state, _mm512_slli_epi32(state, 5));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(state, 8)), _mm512_set1_ps(0x1p-24f));
  }
};

}  // namespace
