// Frozen transformer layers on packed tokens, forward and back, for processors with AVX-512.
//
// Three kinds of products, all in one shape of loop: a group of numbers that fills four bytes of a row
// (one fp32, two bf16, four int8) is broadcast and multiplied with the same group of 64 outputs. Rows are
// worked on in blocks that stay in the caches from one product to the next; a row never depends on others.
//
// Shape letters: M rows, K inputs, N outputs; P packed tokens, T tokens of a row, D size of an attention
// head, H hidden, I intermediate.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Kind : int { FP32 = 0, BF16 = 1, INT8 = 2 };

constexpr int64_t PANEL = 64;    // outputs that are worked on at a time: four registers
constexpr int TILE = 6;          // rows that are worked on at a time
constexpr int64_t BLOCK = 48;    // rows that go through several products together
constexpr int64_t DEPTH = 512;   // groups of inputs after which sums go back to memory

using Vec = __m512;

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// ---------------------------------------------------------------------------------------------------
// Functions of vectors

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

// Numbers in [0, 1), another row of them for each seed and row.
struct Noise {
  __m512i state;
  Noise(uint64_t seed, int64_t row) {
    alignas(64) uint32_t start[16];
    for (int lane = 0; lane < 16; ++lane) {
      uint64_t z = seed + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(row * 16 + lane + 1);
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

// ---------------------------------------------------------------------------------------------------
// Rows as the products read them

struct Weight {
  int64_t inputs, outputs;
  const void* panels;    // (N / 64, K / group, 64, group), filled up with zeros
  const float* scale;    // of int8: by output
  const int32_t* shift;  // of int8: 128 times the sum over the inputs, as rows are kept above zero
  const float* bias;     // or null
};

inline int64_t group_of(int kind) { return kind == FP32 ? 1 : kind == BF16 ? 2 : 4; }

// Rows in the numbers of a product; the stride is in bytes and whole groups long.
struct Operand {
  const uint8_t* data;
  int64_t stride;
  const float* scale;
};

struct Scratch {
  std::vector<uint8_t> bytes;
  std::vector<float> scale;
};

inline int64_t row_bytes(int kind, int64_t inputs) {
  const int64_t group = group_of(kind);
  return (inputs + group - 1) / group * 4;
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
  if (count % 2) target[count] = 0;
#endif
}

// Whole numbers from -127 to 127, kept with 128 added, and the scale of the row. seed: 0, or rounded up
// or down at random.
float to_int8(const float* x, int64_t count, uint64_t seed, int64_t row, uint8_t* out) {
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
  if (seed) {
    Noise noise(seed, row);
    for (k = 0; k < count; k += 16) {
      const __mmask16 lanes = first_lanes(count - k);
      store(k, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), inverse), &noise);
    }
  } else {
    for (k = 0; k + 16 <= count; k += 16) store(k, 0xFFFF, _mm512_mul_ps(_mm512_loadu_ps(x + k), inverse), nullptr);
    if (left) store(k, left, _mm512_mul_ps(_mm512_maskz_loadu_ps(left, x + k), inverse), nullptr);
  }
  for (k = count; k % 4; ++k) out[k] = 128;
  return scale;
}

Operand operand_of(int kind, const float* x, int64_t stride, int64_t rows, int64_t inputs, uint64_t seed,
                   int64_t first_row, Scratch& scratch) {
  if (kind == FP32) return {reinterpret_cast<const uint8_t*>(x), stride * 4, nullptr};
  const int64_t bytes = row_bytes(kind, inputs);
  if (static_cast<int64_t>(scratch.bytes.size()) < rows * bytes) scratch.bytes.resize(rows * bytes);
  if (static_cast<int64_t>(scratch.scale.size()) < rows) scratch.scale.resize(rows);
  for (int64_t m = 0; m < rows; ++m) {
    uint8_t* target = scratch.bytes.data() + m * bytes;
    if (kind == BF16)
      to_bf16(x + m * stride, inputs, target);
    else
      scratch.scale[m] = to_int8(x + m * stride, inputs, seed, first_row + m, target);
  }
  return {scratch.bytes.data(), bytes, scratch.scale.data()};
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

// Sums over `depth` groups of `rows` rows and one panel, on top of what stands in tile if `more`.
template <int kind, int rows>
void tile_product(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t depth, float* tile, bool more) {
  using S = Sum<kind>;
  typename S::Type sums[rows][4];
#pragma GCC unroll 6
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[m][v] = more ? S::load(tile + m * PANEL + 16 * v) : S::zero();
  for (int64_t k = 0; k < depth; ++k) {
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
                  bool more) {
  switch (rows) {
    case 1: return tile_product<kind, 1>(x, stride, panel, depth, tile, more);
    case 2: return tile_product<kind, 2>(x, stride, panel, depth, tile, more);
    case 3: return tile_product<kind, 3>(x, stride, panel, depth, tile, more);
    case 4: return tile_product<kind, 4>(x, stride, panel, depth, tile, more);
    case 5: return tile_product<kind, 5>(x, stride, panel, depth, tile, more);
    default: return tile_product<kind, 6>(x, stride, panel, depth, tile, more);
  }
}

// out = x @ weight + bias (+ plus), (M, N); of int8 the scales are put in.
template <int kind>
void product(const Operand& x, const Weight& w, int64_t rows, const float* plus, int64_t plus_stride, float* out,
             int64_t stride) {
  const int64_t groups = row_bytes(kind, w.inputs) / 4;
  const int64_t depth = kind == INT8 ? groups : std::min(groups, DEPTH);
  const int64_t tiles = (rows + TILE - 1) / TILE;
  alignas(64) float sums[BLOCK / TILE][TILE * PANEL];
  for (int64_t n = 0; n < w.outputs; n += PANEL) {
    const auto* panel = static_cast<const uint8_t*>(w.panels) + n / PANEL * groups * 256;
    for (int64_t k = 0; k < groups; k += depth) {
      const int64_t now = std::min(depth, groups - k);
      for (int64_t t = 0; t < tiles; ++t)
        tile_product<kind>(static_cast<int>(std::min<int64_t>(TILE, rows - t * TILE)), x.data + t * TILE * x.stride + 4 * k,
                           x.stride, panel + 256 * k, now, sums[t], k > 0);
    }
    for (int v = 0; v < 4 && n + 16 * v < w.outputs; ++v) {
      const int64_t at = n + 16 * v;
      const __mmask16 lanes = first_lanes(w.outputs - at);
      const Vec bias = w.bias ? _mm512_maskz_loadu_ps(lanes, w.bias + at) : _mm512_setzero_ps();
      const Vec scale = kind == INT8 ? _mm512_maskz_loadu_ps(lanes, w.scale + at) : bias;
      const __m512i shift = kind == INT8 ? _mm512_maskz_loadu_epi32(lanes, w.shift + at) : _mm512_setzero_si512();
      for (int64_t m = 0; m < rows; ++m) {
        const float* sum = sums[m / TILE] + m % TILE * PANEL + 16 * v;
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

void multiply(int kind, const float* x, int64_t x_stride, int64_t rows, const Weight& w, const float* plus,
              int64_t plus_stride, float* out, int64_t stride, uint64_t seed, int64_t first_row, Scratch& scratch) {
  const Operand operand = operand_of(kind, x, x_stride, rows, w.inputs, seed, first_row, scratch);
  if (kind == FP32) return product<FP32>(operand, w, rows, plus, plus_stride, out, stride);
  if (kind == BF16) return product<BF16>(operand, w, rows, plus, plus_stride, out, stride);
  product<INT8>(operand, w, rows, plus, plus_stride, out, stride);
}

// Blocks of at most BLOCK rows, as many for each thread.
struct Blocks {
  int64_t size, count;
  Blocks(int64_t rows, int threads) {
    const int64_t rounds = std::max<int64_t>(1, (rows + BLOCK * threads - 1) / (BLOCK * threads));
    size = (rows + rounds * threads - 1) / (rounds * threads);
    size = std::max<int64_t>(TILE, std::min(BLOCK, (size + TILE - 1) / TILE * TILE));
    count = (rows + size - 1) / size;
  }
};

// What a block of rows is between two products: (BLOCK, H) and (BLOCK, I).
struct Between {
  std::vector<float> middle, wide;
  void fit(int64_t hidden, int64_t inner) {
    if (static_cast<int64_t>(middle.size()) < BLOCK * hidden) middle.resize(BLOCK * hidden);
    if (static_cast<int64_t>(wide.size()) < BLOCK * inner) wide.resize(BLOCK * inner);
  }
};

// ---------------------------------------------------------------------------------------------------
// Norms

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

// ---------------------------------------------------------------------------------------------------
// What Python calls

extern "C" {

struct WeightArgs {
  int64_t inputs, outputs;
  const void* panels;
  const float* scale;
  const int32_t* shift;
  const float* bias;
};

struct LayerArgs {
  int64_t hidden, inner;
  int32_t kind, act;
  WeightArgs out, up, down, out_back, up_back, down_back;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  float norm1_eps, norm2_eps;
};

static Weight weight_of(const WeightArgs& w) { return {w.inputs, w.outputs, w.panels, w.scale, w.shift, w.bias}; }

// out (M, N) = x (M, K) @ weight + bias (+ plus)
void pastina_affine(int32_t kind, const WeightArgs* weight, const float* x, int64_t rows, const float* plus, float* out,
                    uint64_t seed, int32_t threads) {
  const Weight w = weight_of(*weight);
  const Blocks blocks(rows, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local Scratch scratch;
#pragma omp for schedule(static, 1)
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t from = b * blocks.size, count = std::min(blocks.size, rows - from);
      multiply(kind, x + from * w.inputs, w.inputs, count, w, plus ? plus + from * w.outputs : nullptr, w.outputs,
               out + from * w.outputs, w.outputs, seed, from, scratch);
    }
  }
}

// out = norm2(y + down(act(up(y)))), y = norm1(residual + context @ out); (M, H) each.
// Kept for the way back, or null: unit1, unit2 (M, H), inverse (2, M), slope (M, I): fp32, else bf16.
void pastina_rows(const LayerArgs* layer, const float* context, const float* residual, int64_t rows, float* out,
                  float* unit1, float* unit2, float* inverse, void* slope, int32_t threads) {
  const LayerArgs& l = *layer;
  const Weight project = weight_of(l.out), up = weight_of(l.up), down = weight_of(l.down);
  const Norm norm1{l.norm1_weight, l.norm1_bias, l.norm1_eps}, norm2{l.norm2_weight, l.norm2_bias, l.norm2_eps};
  const int64_t H = l.hidden, I = l.inner;
  const Blocks blocks(rows, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local Scratch scratch;
    thread_local Between between;
    between.fit(H, I);
    float *middle = between.middle.data(), *wide = between.wide.data();
#pragma omp for schedule(static, 1)
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t from = b * blocks.size, count = std::min(blocks.size, rows - from);
      multiply(l.kind, context + from * H, H, count, project, residual + from * H, H, middle, H, 0, from, scratch);
      for (int64_t m = 0; m < count; ++m) {
        const float one = norm_row(norm1, middle + m * H, H, middle + m * H, unit1 ? unit1 + (from + m) * H : nullptr);
        if (inverse) inverse[from + m] = one;
      }
      multiply(l.kind, middle, H, count, up, nullptr, 0, wide, I, 0, from, scratch);
      for (int64_t m = 0; m < count; ++m) {
        float* row = wide + m * I;
        for (int64_t k = 0; k < I; k += 16) {
          const __mmask16 lanes = first_lanes(I - k);
          Vec steep;
          const Vec value = activation_of(l.act, _mm512_maskz_loadu_ps(lanes, row + k), steep);
          _mm512_mask_storeu_ps(row + k, lanes, value);
          if (!slope) continue;
          const int64_t at = (from + m) * I + k;
#ifdef __AVX512BF16__
          if (l.kind != FP32) {
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(slope) + at, lanes, (__m256i)_mm512_cvtneps_pbh(steep));
            continue;
          }
#endif
          _mm512_mask_storeu_ps(static_cast<float*>(slope) + at, lanes, steep);
        }
      }
      multiply(l.kind, wide, I, count, down, middle, H, out + from * H, H, 0, from, scratch);
      for (int64_t m = 0; m < count; ++m) {
        float* row = out + (from + m) * H;
        const float one = norm_row(norm2, row, H, row, unit2 ? unit2 + (from + m) * H : nullptr);
        if (inverse) inverse[rows + from + m] = one;
      }
    }
  }
}

// Gradients of context and residual (M, H), given the output's; see pastina_rows.
void pastina_rows_back(const LayerArgs* layer, const float* grad, int64_t rows, const float* unit1, const float* unit2,
                       const float* inverse, const void* slope, float* grad_context, float* grad_residual, uint64_t seed,
                       int32_t threads) {
  const LayerArgs& l = *layer;
  const Weight project = weight_of(l.out_back), up = weight_of(l.up_back), down = weight_of(l.down_back);
  const Norm norm1{l.norm1_weight, l.norm1_bias, l.norm1_eps}, norm2{l.norm2_weight, l.norm2_bias, l.norm2_eps};
  const int64_t H = l.hidden, I = l.inner;
  const Blocks blocks(rows, threads);
#pragma omp parallel num_threads(threads)
  {
    thread_local Scratch scratch;
    thread_local Between between;
    between.fit(H, I);
    float *middle = between.middle.data(), *wide = between.wide.data();
#pragma omp for schedule(static, 1)
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t from = b * blocks.size, count = std::min(blocks.size, rows - from);
      for (int64_t m = 0; m < count; ++m)
        norm_row_back(norm2, grad + (from + m) * H, unit2 + (from + m) * H, inverse[rows + from + m], H, middle + m * H);
      multiply(l.kind, middle, H, count, down, nullptr, 0, wide, I, seed, from, scratch);
      for (int64_t m = 0; m < count; ++m) {
        float* row = wide + m * I;
        for (int64_t k = 0; k < I; k += 16) {
          const __mmask16 lanes = first_lanes(I - k);
          const int64_t at = (from + m) * I + k;
          Vec steep;
#ifdef __AVX512BF16__
          if (l.kind != FP32)
            steep = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(slope) + at)), 16));
          else
#endif
            steep = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(slope) + at);
          _mm512_mask_storeu_ps(row + k, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, row + k), steep));
        }
      }
      float* out = grad_residual + from * H;
      multiply(l.kind, wide, I, count, up, middle, H, out, H, seed ? seed + 1 : 0, from, scratch);
      for (int64_t m = 0; m < count; ++m)
        norm_row_back(norm1, out + m * H, unit1 + (from + m) * H, inverse[from + m], H, out + m * H);
      multiply(l.kind, out, H, count, project, nullptr, 0, grad_context + from * H, H, seed ? seed + 2 : 0, from, scratch);
    }
  }
}

// Rows of tokens: start (B), length (B) in packed tokens. q: (P, ...) rows of q_stride numbers, or, with
// one_each, one query for each row. context like q but (..., H); log_sum like q but (..., heads), or null.
void pastina_attend(const float* q, int64_t q_stride, const float* k, const float* v, int64_t kv_stride,
                    const int64_t* start, const int64_t* length, int64_t num_rows, int64_t heads, int64_t size,
                    int32_t one_each, float* context, float* log_sum, int32_t threads) {
  const Heads all{q, k, v, q_stride, kv_stride, start, length, num_rows, heads, size, one_each != 0};
  each_head(all, threads, [&](const Head& h, int64_t first, int64_t, int64_t head, Buffers& buffers) {
    attend(h, context + first * heads * size + head * size, heads * size,
           log_sum ? log_sum + first * heads + head : nullptr, heads, buffers);
  });
}

// Gradients of q, k and v, laid out as these are, given the context's; see pastina_attend.
void pastina_attend_back(const float* grad, const float* q, int64_t q_stride, const float* k, const float* v,
                         int64_t kv_stride, const int64_t* start, const int64_t* length, int64_t num_rows, int64_t heads,
                         int64_t size, int32_t one_each, const float* log_sum, float* grad_q, float* grad_k,
                         float* grad_v, int32_t threads) {
  const Heads all{q, k, v, q_stride, kv_stride, start, length, num_rows, heads, size, one_each != 0};
  each_head(all, threads, [&](const Head& h, int64_t first, int64_t token, int64_t head, Buffers& buffers) {
    const int64_t own = head * size, place = token * kv_stride + own;
    attend_back(h, grad + first * heads * size + own, heads * size, log_sum + first * heads + head, heads,
                grad_q + first * q_stride + own, q_stride, grad_k + place, grad_v + place, kv_stride, buffers);
  });
}

}  // extern "C"
