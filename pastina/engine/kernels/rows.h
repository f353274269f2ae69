// What a layer does with each token alone: everything behind attention.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, T tokens of a row, D size of an attention
// head, H hidden, I intermediate.

#pragma once

#include <cmath>

#include "products.h"

namespace {

struct Norm {
  const float *weight, *bias;  // bias may be null
  float eps;
};

// out = norm(x); unit: the normed numbers before weight and bias. Returns the inverse deviation. out may be x.
float norm_row(const Norm& norm, const float* x, int64_t count, float* out, float* unit) {
  Vec sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(count - k), x + k));
  const float mean = _mm512_reduce_add_ps(sum) / count;
  const Vec middle = _mm512_set1_ps(mean);
  Vec square = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec off = _mm512_maskz_sub_ps(lanes, _mm512_maskz_loadu_ps(lanes, x + k), middle);
    square = _mm512_fmadd_ps(off, off, square);
  }
  const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(square) / count + norm.eps);
  const Vec factor = _mm512_set1_ps(inverse);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec own = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + k), middle), factor);
    if (unit) _mm512_mask_storeu_ps(unit + k, lanes, own);
    const Vec bias = norm.bias ? _mm512_maskz_loadu_ps(lanes, norm.bias + k) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out + k, lanes, _mm512_fmadd_ps(own, _mm512_maskz_loadu_ps(lanes, norm.weight + k), bias));
  }
  return inverse;
}

// The gradient of the input, given the output's; out may be grad.
void norm_row_back(const Norm& norm, const float* grad, const float* unit, float inverse, int64_t count, float* out) {
  Vec sum = _mm512_setzero_ps(), along = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec g = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, grad + k), _mm512_maskz_loadu_ps(lanes, norm.weight + k));
    sum = _mm512_add_ps(sum, g);
    along = _mm512_fmadd_ps(g, _mm512_maskz_loadu_ps(lanes, unit + k), along);
  }
  const Vec mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / count);
  const Vec slope = _mm512_set1_ps(_mm512_reduce_add_ps(along) / count);
  const Vec factor = _mm512_set1_ps(inverse);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    Vec g = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, grad + k), _mm512_maskz_loadu_ps(lanes, norm.weight + k));
    g = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(lanes, unit + k), slope, _mm512_sub_ps(g, mean));
    _mm512_mask_storeu_ps(out + k, lanes, _mm512_mul_ps(g, factor));
  }
}

// ---------------------------------------------------------------------------------------------------
// A block of rows behind attention

// As Python hands it over; *_back: null where only answers are wanted; qkv to key_value: for whole passes.
struct Layer {
  int64_t hidden, inner;
  int32_t kind, act;
  Weight out, up, down, out_back, up_back, down_back;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  float norm1_eps, norm2_eps;
  Weight qkv, query, key_value;

  Norm norm1() const { return {norm1_weight, norm1_bias, norm1_eps}; }
  Norm norm2() const { return {norm2_weight, norm2_bias, norm2_eps}; }
};

// What a thread needs for a block between two products: (BLOCK, H) and (BLOCK, I).
struct Between {
  Scratch scratch;
  std::vector<float> middle, wide;
  void fit(const Layer& l) {
    if (static_cast<int64_t>(middle.size()) < BLOCK * l.hidden) middle.resize(BLOCK * l.hidden);
    if (static_cast<int64_t>(wide.size()) < BLOCK * l.inner) wide.resize(BLOCK * l.inner);
  }
};

// Of a block what the way back needs, or null: (M, H), (M), (M, I) in fp32, else in bf16.
struct Kept {
  float *unit1 = nullptr, *unit2 = nullptr, *inverse1 = nullptr, *inverse2 = nullptr;
  void* slope = nullptr;

  // That of the rows from `row` on, given that of all.
  Kept from(int64_t row, const Layer& l) const {
    if (!unit1) return {};
    return {unit1 + row * l.hidden, unit2 + row * l.hidden, inverse1 + row, inverse2 + row,
            static_cast<uint8_t*>(slope) + row * l.inner * (is_fp32(l.kind) ? 4 : 2)};
  }
};

inline void store_slope(const Layer& l, void* slope, int64_t at, __mmask16 lanes, Vec value) {
#ifdef __AVX512BF16__
  if (!is_fp32(l.kind))
    return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(slope) + at, lanes, (__m256i)_mm512_cvtneps_pbh(value));
#endif
  _mm512_mask_storeu_ps(static_cast<float*>(slope) + at, lanes, value);
}

inline Vec load_slope(const Layer& l, const void* slope, int64_t at, __mmask16 lanes) {
#ifdef __AVX512BF16__
  if (!is_fp32(l.kind))
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(slope) + at)), 16));
#endif
  return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(slope) + at);
}

// out = norm2(y + down(act(up(y)))), y = norm1(residual + context @ out); (M, H) each. out may be residual.
void rows_ahead(const Layer& l, const float* context, const float* residual, int64_t rows, float* out, const Kept& kept,
                Between& between) {
  const int64_t H = l.hidden, I = l.inner;
  between.fit(l);
  float *middle = between.middle.data(), *wide = between.wide.data();
  multiply(l.kind, context, H, rows, l.out, residual, H, middle, H, {}, between.scratch);
  const Norm norm1 = l.norm1(), norm2 = l.norm2();
  for (int64_t m = 0; m < rows; ++m) {
    const float one = norm_row(norm1, middle + m * H, H, middle + m * H, kept.unit1 ? kept.unit1 + m * H : nullptr);
    if (kept.inverse1) kept.inverse1[m] = one;
  }
  multiply(l.kind, middle, H, rows, l.up, nullptr, 0, wide, I, {}, between.scratch);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < I; k += 16) {
      const __mmask16 lanes = first_lanes(I - k);
      Vec steep;
      const Vec value = activation_of(l.act, _mm512_maskz_loadu_ps(lanes, wide + m * I + k), steep);
      _mm512_mask_storeu_ps(wide + m * I + k, lanes, value);
      if (kept.slope) store_slope(l, kept.slope, m * I + k, lanes, steep);
    }
  }
  multiply(l.kind, wide, I, rows, l.down, middle, H, out, H, {}, between.scratch);
  for (int64_t m = 0; m < rows; ++m) {
    const float one = norm_row(norm2, out + m * H, H, out + m * H, kept.unit2 ? kept.unit2 + m * H : nullptr);
    if (kept.inverse2) kept.inverse2[m] = one;
  }
}

// Gradients of context and residual (M, H), given the output's.
void rows_back(const Layer& l, const float* grad, int64_t rows, const Kept& kept, float* grad_context,
               float* grad_residual, const Rounding& rounding, Between& between) {
  const int64_t H = l.hidden, I = l.inner;
  between.fit(l);
  float *middle = between.middle.data(), *wide = between.wide.data();
  const Norm norm1 = l.norm1(), norm2 = l.norm2();
  for (int64_t m = 0; m < rows; ++m)
    norm_row_back(norm2, grad + m * H, kept.unit2 + m * H, kept.inverse2[m], H, middle + m * H);
  multiply(l.kind, middle, H, rows, l.down_back, nullptr, 0, wide, I, rounding, between.scratch);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < I; k += 16) {
      const __mmask16 lanes = first_lanes(I - k);
      const Vec steep = load_slope(l, kept.slope, m * I + k, lanes);
      float* at = wide + m * I + k;
      _mm512_mask_storeu_ps(at, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, at), steep));
    }
  }
  float* out = grad_residual;
  multiply(l.kind, wide, I, rows, l.up_back, middle, H, out, H, rounding.and_other(1), between.scratch);
  for (int64_t m = 0; m < rows; ++m)
    norm_row_back(norm1, out + m * H, kept.unit1 + m * H, kept.inverse1[m], H, out + m * H);
  multiply(l.kind, out, H, rows, l.out_back, nullptr, 0, grad_context, H, rounding.and_other(2), between.scratch);
}

}  // namespace
