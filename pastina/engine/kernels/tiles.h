// Products of sixteen rows with sixteen outputs at a time, for processors with AMX.
//
// The panels and rows are those of products.h: sixteen groups of a row are a line of a tile, sixteen groups of a
// panel the lines of another. Int8 is exact, so it gives what AVX-512 gives; a row never depends on others.
//
// Shape letters: M rows, K inputs, N outputs.

#pragma once

#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define PASTINA_TILES 1
#endif

namespace {

#ifdef PASTINA_TILES

constexpr bool HAS_TILES = true;

// While it lives all eight tiles have sixteen lines of 64 bytes: 0 to 5 are sums, 6 rows, 7 weights. Others
// that multiply on this thread set theirs before they begin.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Of `lines` times 16 rows and 32 outputs: sums over `steps` times 16 groups, to `sums`, 64 numbers a line.
template <bool whole, int lines>
void tile_sums(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
#define PASTINA_ADD(sum)           \
  if constexpr (whole)             \
    _tile_dpbusd(sum, 6, 7);       \
  else                             \
    _tile_dpbf16ps(sum, 6, 7);
#define PASTINA_LINE(line, sum)                       \
  if constexpr (lines > line) {                       \
    _tile_loadd(6, x + line * 16 * stride, stride);   \
    PASTINA_ADD(sum)                                  \
  }
#define PASTINA_STORE(line, first, second)            \
  if constexpr (lines > line) {                       \
    _tile_stored(first, sums + line * 1024, 256);     \
    _tile_stored(second, sums + line * 1024 + 16, 256); \
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(7, panel, 256);
    PASTINA_LINE(0, 0)
    PASTINA_LINE(1, 1)
    PASTINA_LINE(2, 2)
    _tile_loadd(7, panel + 64, 256);
    PASTINA_LINE(0, 3)
    PASTINA_LINE(1, 4)
    PASTINA_LINE(2, 5)
    x += 64;
    panel += 16 * 256;
  }
  PASTINA_STORE(0, 0, 3)
  PASTINA_STORE(1, 1, 4)
  PASTINA_STORE(2, 2, 5)
#undef PASTINA_ADD
#undef PASTINA_LINE
#undef PASTINA_STORE
}

template <bool whole>
void tile_sums(int64_t rows, const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
  if (rows > 32) return tile_sums<whole, 3>(x, stride, panel, steps, sums);
  if (rows > 16) return tile_sums<whole, 2>(x, stride, panel, steps, sums);
  tile_sums<whole, 1>(x, stride, panel, steps, sums);
}

// Of fp32 in three parts, high, middle and low, each of which is a bf16: x w = sum of x_i w_j. The six largest of
// the nine products are taken, so that what is left out is smaller than what fp32 rounds off; a sum is kept in fp32.
// A step is 32 inputs: of a row three parts of 64 bytes, of half a panel two times sixteen outputs of three parts,
// a tile each. Of `lines` times 16 rows and half a panel: sums over all steps, to `sums`, 64 numbers a line.
constexpr int64_t PARTS = 3, PART_TILE = 1024;

template <int lines>
void part_sums(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums);

// Sums 0 to 2 of the first sixteen outputs, 3 to 5 of the others.
template <>
void part_sums<3>(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
#define PASTINA_ADD(part, line, sum)                                  \
  _tile_loadd(6, x + line * 16 * stride + part * PART_TILE, 64); \
  _tile_dpbf16ps(sum, 6, 7);
#define PASTINA_PART(part, a, b, c) \
  PASTINA_ADD(part, 0, a)           \
  PASTINA_ADD(part, 1, b)           \
  PASTINA_ADD(part, 2, c)
#define PASTINA_OUTPUTS(a, b, c)             \
  _tile_loadd(7, panel, 64);                 \
  PASTINA_PART(2, a, b, c)                   \
  PASTINA_PART(1, a, b, c)                   \
  PASTINA_PART(0, a, b, c)                   \
  _tile_loadd(7, panel + PART_TILE, 64);     \
  PASTINA_PART(1, a, b, c)                   \
  PASTINA_PART(0, a, b, c)                   \
  _tile_loadd(7, panel + 2 * PART_TILE, 64); \
  PASTINA_PART(0, a, b, c)                   \
  panel += PARTS * PART_TILE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t step = 0; step < steps; ++step, x += PARTS * PART_TILE) {
    PASTINA_OUTPUTS(0, 1, 2)
    PASTINA_OUTPUTS(3, 4, 5)
  }
#undef PASTINA_ADD
#undef PASTINA_PART
#undef PASTINA_OUTPUTS
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 1024, 256);
  _tile_stored(2, sums + 2048, 256);
  _tile_stored(3, sums + 16, 256);
  _tile_stored(4, sums + 1040, 256);
  _tile_stored(5, sums + 2064, 256);
}

// Sums 0 and 1 of the first sixteen outputs, 2 and 3 of the others: four in turn, for one waits for itself.
template <>
void part_sums<2>(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
#define PASTINA_WEIGHTS(part)                                     \
  _tile_loadd(6, panel + part * PART_TILE, 64);                   \
  _tile_loadd(7, panel + (PARTS + part) * PART_TILE, 64);
#define PASTINA_PART(part)                                        \
  _tile_loadd(4, x + part * PART_TILE, 64);                  \
  _tile_loadd(5, x + 16 * stride + part * PART_TILE, 64);    \
  _tile_dpbf16ps(0, 4, 6);                                        \
  _tile_dpbf16ps(1, 5, 6);                                        \
  _tile_dpbf16ps(2, 4, 7);                                        \
  _tile_dpbf16ps(3, 5, 7);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, x += PARTS * PART_TILE, panel += 2 * PARTS * PART_TILE) {
    PASTINA_WEIGHTS(0)
    PASTINA_PART(2)
    PASTINA_PART(1)
    PASTINA_PART(0)
    PASTINA_WEIGHTS(1)
    PASTINA_PART(1)
    PASTINA_PART(0)
    PASTINA_WEIGHTS(2)
    PASTINA_PART(0)
  }
#undef PASTINA_WEIGHTS
#undef PASTINA_PART
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 1024, 256);
  _tile_stored(2, sums + 16, 256);
  _tile_stored(3, sums + 1040, 256);
}

// Of one line all 64 outputs, sixteen of each sum, for the same reason.
template <>
void part_sums<1>(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
#define PASTINA_ADD(sum, from, own, part)       \
  _tile_loadd(7, from + (part) * PART_TILE, 64); \
  _tile_dpbf16ps(sum, own, 7);
#define PASTINA_PART(own, part)                 \
  PASTINA_ADD(0, panel, own, part)              \
  PASTINA_ADD(1, panel, own, PARTS + part)      \
  PASTINA_ADD(2, other, own, part)              \
  PASTINA_ADD(3, other, own, PARTS + part)
  const uint8_t* other = panel + steps * 2 * PARTS * PART_TILE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, x + PART_TILE, 64);
    _tile_loadd(6, x + 2 * PART_TILE, 64);
    PASTINA_PART(6, 0)
    PASTINA_PART(5, 0)
    PASTINA_PART(4, 0)
    PASTINA_PART(5, 1)
    PASTINA_PART(4, 1)
    PASTINA_PART(4, 2)
    x += PARTS * PART_TILE;
    panel += 2 * PARTS * PART_TILE;
    other += 2 * PARTS * PART_TILE;
  }
#undef PASTINA_ADD
#undef PASTINA_PART
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + 16, 256);
  _tile_stored(2, sums + 32, 256);
  _tile_stored(3, sums + 48, 256);
}

// Of rows, at most 48, and a panel: (M, 64). A sum takes its products in one order, however many rows there are.
void part_sums(int64_t rows, const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, float* sums) {
  if (rows <= 16) return part_sums<1>(x, stride, panel, steps, sums);
  for (int64_t half = 0; half < 2; ++half, panel += steps * 2 * PARTS * PART_TILE, sums += 32)
    if (rows > 32)
      part_sums<3>(x, stride, panel, steps, sums);
    else
      part_sums<2>(x, stride, panel, steps, sums);
}

#else

constexpr bool HAS_TILES = false;
struct Tiles {};
constexpr int64_t PARTS = 3, PART_TILE = 1024;
template <bool whole>
void tile_sums(int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, float*) {}
inline void part_sums(int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, float*) {}

#endif

}  // namespace
