// Products of rows with frozen weights in three kinds of numbers, fp32 in two ways.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, T tokens of a row, D size of an attention
// head, H hidden, I intermediate.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "tiles.h"

namespace {

enum Kind : int { FP32 = 0, BF16 = 1, INT8 = 2, FP32_PARTS = 3 };  // the last only with tiles: see part_sums

constexpr bool is_fp32(int kind) { return kind == FP32 || kind == FP32_PARTS; }

constexpr int64_t PANEL = 64;    // outputs that are worked on at a time: four registers
constexpr int TILE = 6;          // rows that are worked on at a time
constexpr int64_t GROUP = 48;    // rows that read a panel together
constexpr int64_t BLOCK = HAS_TILES ? 96 : GROUP;  // rows that go through several products together
constexpr int64_t DEPTH = 512;   // groups of inputs after which sums go back to memory

// ---------------------------------------------------------------------------------------------------
// Rows as the products read them

// As Python hands it over.
struct Weight {
  int64_t inputs, outputs;
  const void* panels;    // (N / 64, K / group, 64, group), filled up with zeros; in parts: as part_sums reads them
  const float* scale;    // of int8: by output
  const int32_t* shift;  // of int8: 128 times the sum over the inputs, as rows are kept above zero
  const float* bias;     // or null
};

inline int64_t group_of(int kind) { return kind == FP32 ? 1 : kind == INT8 ? 4 : 2; }

// Rows in the numbers of a product; the stride is in bytes. Of tiles there is room behind the last row.
struct Operand {
  const uint8_t* data;
  int64_t stride;
  const float* scale;
};

// Lines of tiles have to lie in one line of the caches: loads that cross two take twice as long.
struct Scratch {
  std::vector<uint8_t> bytes;
  std::vector<float> scale;
  uint8_t* room(int64_t size) {
    if (static_cast<int64_t>(bytes.size()) < size + 63) bytes.resize(size + 63);
    return bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & 63);
  }
};

// Of fp32 what is there, else filled up to lines of 64 bytes, whose weights are zero; of parts a line each.
inline int64_t row_bytes(int kind, int64_t inputs) {
  if (kind == FP32) return inputs * 4;
  const int64_t lines = (inputs + 16 * group_of(kind) - 1) / (16 * group_of(kind));
  return lines * (kind == FP32_PARTS ? PARTS * 64 : 64);
}

void to_bf16(const float* x, int64_t count, uint8_t* out) {
#ifdef __AVX512BF16__
  auto* target = reinterpret_cast<uint16_t*>(out);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
  if (k < count) {
    const __mmask16 left = first_lanes(count - k);
    _mm256_mask_storeu_epi16(target + k, left, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(left, x + k)));
  }
  for (k = count; k % 32; ++k) target[k] = 0;
#endif
}

// The high, middle and low parts of 32 numbers, a tile apart each; their sum is the number.
void to_parts(const float* x, int64_t count, uint8_t* out) {
  alignas(64) static constexpr auto odd = [] {
    std::array<uint16_t, 32> places{};
    for (uint16_t i = 0; i < 32; ++i) places[i] = 2 * i + 1;
    return places;
  }();
  const __m512i upper_halves = _mm512_load_si512(odd.data()), mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int64_t k = 0; k < count; k += 32) {
    Vec first = _mm512_maskz_loadu_ps(first_lanes(count - k), x + k);
    Vec second = _mm512_maskz_loadu_ps(first_lanes(count - k - 16), x + k + 16);
    for (int64_t part = 0; part < PARTS; ++part, out += PART_TILE) {
      const __m512i one = _mm512_castps_si512(first), two = _mm512_castps_si512(second);
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(one, upper_halves, two));
      first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(one, mask)));
      second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(two, mask)));
    }
  }
}

// By what each row is rounded up or down at random; without keys to the nearest number. other: added to
// the keys, for products that are rounded otherwise.
struct Rounding {
  const uint64_t* keys = nullptr;
  uint64_t other = 0;
  Rounding from(int64_t row) const { return {keys ? keys + row : nullptr, other}; }
  Rounding and_other(uint64_t more) const { return {keys, other + more}; }
};

// Whole numbers from -127 to 127, kept with 128 added, and the scale of the row.
float to_int8(const float* x, int64_t count, const Rounding& rounding, int64_t row, uint8_t* out) {
  // As whole numbers, floats without their sign are in order, and NaN is above all.
  const __m512i plain = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(plain, _mm512_castps_si512(_mm512_loadu_ps(x + k))));
  const __mmask16 left = first_lanes(count - k);
  if (left)
    largest = _mm512_max_epi32(
        largest, _mm512_and_si512(plain, _mm512_castps_si512(_mm512_maskz_loadu_ps(left, x + k))));
  const int32_t bits = _mm512_reduce_max_epi32(largest);
  float top;
  std::memcpy(&top, &bits, 4);
  const float scale = (top < 1e-28f ? 1e-28f : top) / 127.0f;
  const Vec inverse = _mm512_set1_ps(1.0f / scale);
  const __m512i middle = _mm512_set1_epi32(128), lowest = _mm512_set1_epi32(1), highest = _mm512_set1_epi32(255);
  auto store = [&](int64_t at, __mmask16 lanes, Vec scaled, Noise* noise) {
    __m512i whole;
    if (noise)
      whole = _mm512_cvt_roundps_epi32(_mm512_add_ps(scaled, noise->next()), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    else
      whole = _mm512_cvtps_epi32(scaled);
    whole = _mm512_min_epi32(_mm512_max_epi32(_mm512_add_epi32(whole, middle), lowest), highest);
    _mm512_mask_cvtusepi32_storeu_epi8(out + at, lanes, whole);
  };
  if (rounding.keys) {
    Noise noise(rounding.keys[row] + rounding.other);
    for (k = 0; k < count; k += 16) {
      const __mmask16 lanes = first_lanes(count - k);
      store(k, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), inverse), &noise);
    }
  } else {
    for (k = 0; k + 16 <= count; k += 16) store(k, 0xFFFF, _mm512_mul_ps(_mm512_loadu_ps(x + k), inverse), nullptr);
    if (left) store(k, left, _mm512_mul_ps(_mm512_maskz_loadu_ps(left, x + k), inverse), nullptr);
  }
  for (k = count; k % 64; ++k) out[k] = 128;
  return scale;
}

Operand operand_of(int kind, const float* x, int64_t stride, int64_t rows, int64_t inputs, const Rounding& rounding,
                   Scratch& scratch) {
  if (kind == FP32) return {reinterpret_cast<const uint8_t*>(x), stride * 4, nullptr};
  const int64_t bytes = row_bytes(kind, inputs);
  uint8_t* lines = scratch.room((rows + 15) / 16 * 16 * bytes);
  if (static_cast<int64_t>(scratch.scale.size()) < rows) scratch.scale.resize(rows);
  for (int64_t m = 0; m < rows; ++m) {
    uint8_t* target = lines + (kind == FP32_PARTS ? m / 16 * 16 * bytes + m % 16 * 64 : m * bytes);
    if (kind == BF16)
      to_bf16(x + m * stride, inputs, target);
    else if (kind == FP32_PARTS)
      to_parts(x + m * stride, inputs, target);
    else
      scratch.scale[m] = to_int8(x + m * stride, inputs, rounding, m, target);
  }
  return {lines, bytes, scratch.scale.data()};
}

// ---------------------------------------------------------------------------------------------------
// Products

template <int kind>
struct Sum;
template <>
struct Sum<FP32> {
  using Type = Vec;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type load(const float* at) { return _mm512_loadu_ps(at); }
  static Type add(Type sum, const uint8_t* group, const uint8_t* panel) {
    float x;
    std::memcpy(&x, group, 4);
    return _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_load_ps(panel), sum);
  }
};
template <>
struct Sum<BF16> {
  using Type = Vec;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type load(const float* at) { return _mm512_loadu_ps(at); }
  static Type add(Type sum, const uint8_t* group, const uint8_t* panel) {
#ifdef __AVX512BF16__
    int32_t x;
    std::memcpy(&x, group, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)_mm512_load_si512(panel));
#else
    return sum;
#endif
  }
};
template <>
struct Sum<INT8> {
  using Type = __m512i;
  static Type zero() { return _mm512_setzero_si512(); }
  static Type load(const float* at) { return _mm512_loadu_si512(at); }
  static Type add(Type sum, const uint8_t* group, const uint8_t* panel) {
    int32_t x;
    std::memcpy(&x, group, 4);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(x), _mm512_load_si512(panel));
  }
};

inline void put(float* at, Vec value) { _mm512_storeu_ps(at, value); }
inline void put(float* at, __m512i value) { _mm512_storeu_si512(at, value); }

// Sums over `depth` groups of `rows` rows and one panel, on top of what stands in tile if `more`. ahead: `depth`
// lines of 64 bytes that will be read next, asked for meanwhile; behind the last weight that does nothing.
template <int kind, int rows>
void tile_product(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t depth, float* tile, bool more,
                  const uint8_t* ahead) {
  using S = Sum<kind>;
  typename S::Type sums[rows][4];
#pragma GCC unroll 6
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[m][v] = more ? S::load(tile + m * PANEL + 16 * v) : S::zero();
  for (int64_t k = 0; k < depth; ++k) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * k), _MM_HINT_T1);
#pragma GCC unroll 6
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[m][v] = S::add(sums[m][v], x + m * stride + 4 * k, panel + 256 * k + 64 * v);
  }
#pragma GCC unroll 6
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) put(tile + m * PANEL + 16 * v, sums[m][v]);
}

template <int kind>
void tile_product(int rows, const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t depth, float* tile,
                  bool more, const uint8_t* ahead) {
  switch (rows) {
    case 1: return tile_product<kind, 1>(x, stride, panel, depth, tile, more, ahead);
    case 2: return tile_product<kind, 2>(x, stride, panel, depth, tile, more, ahead);
    case 3: return tile_product<kind, 3>(x, stride, panel, depth, tile, more, ahead);
    case 4: return tile_product<kind, 4>(x, stride, panel, depth, tile, more, ahead);
    case 5: return tile_product<kind, 5>(x, stride, panel, depth, tile, more, ahead);
    default: return tile_product<kind, 6>(x, stride, panel, depth, tile, more, ahead);
  }
}

// Sums of `rows` rows, at most GROUP, and one panel: (M, 64).
template <int kind>
void panel_product(const Operand& x, int64_t from, int64_t rows, const uint8_t* panel, int64_t groups, float* sums) {
  const uint8_t* data = x.data + from * x.stride;
  if constexpr (kind == FP32_PARTS) {
    part_sums(rows, data, x.stride, panel, groups / (16 * PARTS), sums);
  } else if constexpr (HAS_TILES && kind != FP32) {
    for (int64_t half = 0; half < 2; ++half)
      tile_sums<kind == INT8>(rows, data, x.stride, panel + 128 * half, groups / 16, sums + 32 * half);
  } else {
    const int64_t depth = kind == INT8 ? groups : std::min(groups, DEPTH);
    for (int64_t k = 0; k < groups; k += depth) {
      const int64_t now = std::min(depth, groups - k);
      for (int64_t m = 0; m < rows; m += TILE)
        tile_product<kind>(static_cast<int>(std::min<int64_t>(TILE, rows - m)), data + m * x.stride + 4 * k, x.stride,
                           panel + 256 * k, now, sums + m * PANEL, k > 0,
                           panel + 256 * (groups + k) + 64 * now * (m / TILE % 4));
    }
  }
}

// Rows that read a panel together, of those that are left; with tiles rather twice 32 than 48 and 16.
template <int kind>
int64_t group_rows(int64_t left) {
  return HAS_TILES && kind != FP32 && left > 48 && left <= 64 ? 32 : std::min(left, GROUP);
}

// out = x @ weight + bias (+ plus), (M, N); of int8 the scales are put in.
template <int kind>
void product(const Operand& x, const Weight& w, int64_t rows, const float* plus, int64_t plus_stride, float* out,
             int64_t stride) {
  const int64_t groups = row_bytes(kind, w.inputs) / 4;
  alignas(64) float sums[GROUP * PANEL];
  [[maybe_unused]] const std::conditional_t<kind == FP32, int, Tiles> tiles{};
  for (int64_t n = 0; n < w.outputs; n += PANEL) {
    const auto* panel = static_cast<const uint8_t*>(w.panels) + n / PANEL * groups * 256;
    for (int64_t from = 0, behind; from < rows; from = behind) {
      behind = from + group_rows<kind>(rows - from);
      panel_product<kind>(x, from, behind - from, panel, groups, sums);
      for (int v = 0; v < 4 && n + 16 * v < w.outputs; ++v) {
        const int64_t at = n + 16 * v;
        const __mmask16 lanes = first_lanes(w.outputs - at);
        const Vec bias = w.bias ? _mm512_maskz_loadu_ps(lanes, w.bias + at) : _mm512_setzero_ps();
        const Vec scale = kind == INT8 ? _mm512_maskz_loadu_ps(lanes, w.scale + at) : bias;
        const __m512i shift = kind == INT8 ? _mm512_maskz_loadu_epi32(lanes, w.shift + at) : _mm512_setzero_si512();
        for (int64_t m = from; m < behind; ++m) {
          const float* sum = sums + (m - from) * PANEL + 16 * v;
          Vec value;
          if constexpr (kind == INT8) {
            const Vec whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sum), shift));
            value = _mm512_fmadd_ps(_mm512_mul_ps(whole, scale), _mm512_set1_ps(x.scale[m]), bias);
          } else {
            value = _mm512_add_ps(_mm512_load_ps(sum), bias);
          }
          if (plus) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, plus + m * plus_stride + at));
          _mm512_mask_storeu_ps(out + m * stride + at, lanes, value);
        }
      }
    }
  }
}

void multiply(int kind, const float* x, int64_t x_stride, int64_t rows, const Weight& w, const float* plus,
              int64_t plus_stride, float* out, int64_t stride, const Rounding& rounding, Scratch& scratch) {
  const Operand operand = operand_of(kind, x, x_stride, rows, w.inputs, rounding, scratch);
  if (kind == FP32) return product<FP32>(operand, w, rows, plus, plus_stride, out, stride);
  if (kind == BF16) return product<BF16>(operand, w, rows, plus, plus_stride, out, stride);
  if constexpr (HAS_TILES)
    if (kind == FP32_PARTS) return product<FP32_PARTS>(operand, w, rows, plus, plus_stride, out, stride);
  product<INT8>(operand, w, rows, plus, plus_stride, out, stride);
}

// Rows that a product works on together.
inline int64_t rows_at_once(int kind) { return HAS_TILES && kind != FP32 ? 16 : TILE; }

// Blocks of at most BLOCK rows; neighbouring ones for each thread, as many, and as many rows to a step.
struct Blocks {
  int64_t rows, step, steps, count;
  Blocks(int kind, int64_t rows, int threads) : rows(rows), step(rows_at_once(kind)), steps((rows + step - 1) / step) {
    const int64_t round = BLOCK / step * threads;
    count = std::min(steps, (steps + round - 1) / round * threads);
  }
  int64_t start(int64_t block) const { return std::min(rows, block * steps / count * step); }
};

// out = x @ weight + bias for any number of rows, a block at a time; all lie in one piece.
void multiply_blocks(int kind, const float* x, int64_t rows, const Weight& w, float* out, Scratch& scratch) {
  for (int64_t from = 0; from < rows; from += BLOCK)
    multiply(kind, x + from * w.inputs, w.inputs, std::min(BLOCK, rows - from), w, nullptr, 0, out + from * w.outputs,
             w.outputs, {}, scratch);
}

}  // namespace
