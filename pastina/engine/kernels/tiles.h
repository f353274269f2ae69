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

#else

constexpr bool HAS_TILES = false;
struct Tiles {};
template <bool whole>
void tile_sums(int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, float*) {}

#endif

}  // namespace
