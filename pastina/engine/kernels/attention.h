// Attention of one head in one row, and of all heads of all rows.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, T tokens of a row, D size of an attention
// head, H hidden, I intermediate.

#pragma once

#include <cmath>

#include "products.h"

namespace {

// ---------------------------------------------------------------------------------------------------
// Small products in fp32, for attention: out (M, N) = a (M, K) @ b (K, N); rows of b and out lie in one piece

template <int rows, int vectors>
void small_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_stride, int64_t depth,
                float* out, int64_t stride, __mmask16 last, bool more) {
  Vec sums[rows][vectors];
#pragma GCC unroll 6
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sums[m][v] = !more ? _mm512_setzero_ps()
                         : _mm512_maskz_loadu_ps(v + 1 == vectors ? last : 0xFFFF, out + m * stride + 16 * v);
  for (int64_t k = 0; k < depth; ++k) {
    Vec own[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      own[v] = v + 1 == vectors ? _mm512_maskz_loadu_ps(last, b + k * b_stride + 16 * v)
                                : _mm512_loadu_ps(b + k * b_stride + 16 * v);
#pragma GCC unroll 6
    for (int m = 0; m < rows; ++m) {
      const Vec x = _mm512_set1_ps(a[m * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[m][v] = _mm512_fmadd_ps(x, own[v], sums[m][v]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      if (v + 1 == vectors)
        _mm512_mask_storeu_ps(out + m * stride + 16 * v, last, sums[m][v]);
      else
        _mm512_storeu_ps(out + m * stride + 16 * v, sums[m][v]);
}

template <int vectors>
void small_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_stride,
                int64_t depth, float* out, int64_t stride, __mmask16 last, bool more) {
  int64_t m = 0;
  auto some = [&](auto tile) { tile(a + m * a_row, a_row, a_step, b, b_stride, depth, out + m * stride, stride, last, more); };
  for (; m + 6 <= rows; m += 6) some(small_tile<6, vectors>);
  switch (rows - m) {
    case 1: return some(small_tile<1, vectors>);
    case 2: return some(small_tile<2, vectors>);
    case 3: return some(small_tile<3, vectors>);
    case 4: return some(small_tile<4, vectors>);
    case 5: return some(small_tile<5, vectors>);
  }
}

void small_product(int64_t rows, int64_t outputs, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                   const float* b, int64_t b_stride, float* out, int64_t stride, bool more = false) {
  for (int64_t n = 0; n < outputs; n += PANEL) {
    const int64_t left = std::min(PANEL, outputs - n);
    const __mmask16 last = first_lanes(left % 16 ? left % 16 : 16);
    switch ((left + 15) / 16) {
      case 1: small_rows<1>(rows, a, a_row, a_step, b + n, b_stride, depth, out + n, stride, last, more); break;
      case 2: small_rows<2>(rows, a, a_row, a_step, b + n, b_stride, depth, out + n, stride, last, more); break;
      case 3: small_rows<3>(rows, a, a_row, a_step, b + n, b_stride, depth, out + n, stride, last, more); break;
      default: small_rows<4>(rows, a, a_row, a_step, b + n, b_stride, depth, out + n, stride, last, more);
    }
  }
}

// Sixteen rows of sixteen numbers, the other way round.
inline void turn_square(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// out (D, stride) = x (T, D) the other way round; columns from T to the next multiple of 16 become zero.
void turn(const float* x, int64_t x_stride, int64_t tokens, int64_t size, float* out, int64_t stride) {
  for (int64_t t = 0; t < tokens; t += 16) {
    const int64_t rows = std::min<int64_t>(16, tokens - t);
    for (int64_t d = 0; d < size; d += 16) {
      const int64_t columns = std::min<int64_t>(16, size - d);
      const __mmask16 lanes = first_lanes(columns);
      __m512i square[16];
      for (int64_t i = 0; i < 16; ++i)
        square[i] = i < rows ? _mm512_maskz_loadu_epi32(lanes, x + (t + i) * x_stride + d) : _mm512_setzero_si512();
      turn_square(square);
      for (int64_t i = 0; i < columns; ++i) _mm512_storeu_si512(out + (d + i) * stride + t, square[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Attention of one head in one row

constexpr int64_t QUERIES = 48;  // that are worked on at a time

struct Head {
  const float *q, *k, *v;
  int64_t q_stride, kv_stride, queries, tokens, size;
};

struct Buffers {
  std::vector<float> keys, values, scores, grads;
  void fit(const Head& h, bool back) {
    const size_t wide = static_cast<size_t>(h.tokens + 15) / 16 * 16;
    const size_t rows = static_cast<size_t>(std::min(QUERIES, h.queries));
    grow(keys, wide * h.size);
    grow(scores, rows * wide);
    if (back) {
      grow(values, wide * h.size);
      grow(grads, rows * wide);
    }
  }
  static void grow(std::vector<float>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  }
};

// scores -> softmax, in place; returns the logarithm of the sum.
float softmax_row(float* scores, int64_t count) {
  Vec top = _mm512_set1_ps(-INFINITY);
  for (int64_t k = 0; k < count; k += 16)
    top = _mm512_max_ps(top, _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(count - k), scores + k));
  const float largest = _mm512_reduce_max_ps(top);
  const Vec most = _mm512_set1_ps(largest);
  Vec sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec own = _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + k), most)));
    _mm512_mask_storeu_ps(scores + k, lanes, own);
    sum = _mm512_add_ps(sum, own);
  }
  const float total = _mm512_reduce_add_ps(sum);
  const Vec share = _mm512_set1_ps(1.0f / total);
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    _mm512_mask_storeu_ps(scores + k, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, scores + k), share));
  }
  return largest + std::log(total);
}

void attend(const Head& h, float* out, int64_t out_stride, float* log_sum, int64_t log_stride, Buffers& buffers) {
  buffers.fit(h, false);
  const int64_t wide = (h.tokens + 15) / 16 * 16;
  turn(h.k, h.kv_stride, h.tokens, h.size, buffers.keys.data(), wide);
  for (int64_t from = 0; from < h.queries; from += QUERIES) {
    const int64_t rows = std::min(QUERIES, h.queries - from);
    float* scores = buffers.scores.data();
    small_product(rows, h.tokens, h.size, h.q + from * h.q_stride, h.q_stride, 1, buffers.keys.data(), wide, scores, wide);
    for (int64_t m = 0; m < rows; ++m) {
      const float sum = softmax_row(scores + m * wide, h.tokens);
      if (log_sum) log_sum[(from + m) * log_stride] = sum;
    }
    small_product(rows, h.size, h.tokens, scores, wide, 1, h.v, h.kv_stride, out + from * out_stride, out_stride);
  }
}

// grad_scores = weights * (grad_weights - sum(weights * grad_weights)), in the place of grad_weights;
// scores become weights.
void scores_row_back(float* scores, float* grads, int64_t count, float log_sum) {
  const Vec all = _mm512_set1_ps(log_sum);
  Vec sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec own = _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + k), all)));
    _mm512_mask_storeu_ps(scores + k, lanes, own);
    sum = _mm512_fmadd_ps(own, _mm512_maskz_loadu_ps(lanes, grads + k), sum);
  }
  const Vec mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec off = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, grads + k), mean);
    _mm512_mask_storeu_ps(grads + k, lanes, _mm512_mul_ps(off, _mm512_maskz_loadu_ps(lanes, scores + k)));
  }
}

void attend_back(const Head& h, const float* grad, int64_t grad_stride, const float* log_sum, int64_t log_stride,
                 float* grad_q, int64_t grad_q_stride, float* grad_k, float* grad_v, int64_t grad_kv_stride,
                 Buffers& buffers) {
  buffers.fit(h, true);
  const int64_t wide = (h.tokens + 15) / 16 * 16;
  turn(h.k, h.kv_stride, h.tokens, h.size, buffers.keys.data(), wide);
  turn(h.v, h.kv_stride, h.tokens, h.size, buffers.values.data(), wide);
  float *scores = buffers.scores.data(), *grads = buffers.grads.data();
  for (int64_t from = 0; from < h.queries; from += QUERIES) {
    const int64_t rows = std::min(QUERIES, h.queries - from);
    const float *q = h.q + from * h.q_stride, *own = grad + from * grad_stride;
    small_product(rows, h.tokens, h.size, q, h.q_stride, 1, buffers.keys.data(), wide, scores, wide);
    small_product(rows, h.tokens, h.size, own, grad_stride, 1, buffers.values.data(), wide, grads, wide);
    for (int64_t m = 0; m < rows; ++m)
      scores_row_back(scores + m * wide, grads + m * wide, h.tokens, log_sum[(from + m) * log_stride]);
    small_product(rows, h.size, h.tokens, grads, wide, 1, h.k, h.kv_stride, grad_q + from * grad_q_stride, grad_q_stride);
    small_product(h.tokens, h.size, rows, grads, 1, wide, q, h.q_stride, grad_k, grad_kv_stride, from > 0);
    small_product(h.tokens, h.size, rows, scores, 1, wide, own, grad_stride, grad_v, grad_kv_stride, from > 0);
  }
}

// The heads of all rows. one_each: a row has one query.
struct Heads {
  const float *q, *k, *v;
  int64_t q_stride, kv_stride;
  const int64_t *start, *length;
  int64_t num_rows, heads, size;
  bool one_each;
};

// work(head, its first query, its first token, its number, buffers) for each head of each row.
template <typename Work>
void each_head(const Heads& all, int threads, Work work) {
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < all.num_rows * all.heads; ++task) {
      const int64_t row = task / all.heads, head = task % all.heads, token = all.start[row];
      const int64_t first = all.one_each ? row : token, own = head * all.size;
      const Head h{all.q + first * all.q_stride + own,
                   all.k + token * all.kv_stride + own,
                   all.v + token * all.kv_stride + own,
                   all.q_stride,
                   all.kv_stride,
                   all.one_each ? 1 : all.length[row],
                   all.length[row],
                   all.size};
      work(h, first, token, head, buffers);
    }
  }
}

}  // namespace
