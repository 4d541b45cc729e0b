// Matrix products in the tiles of Intel's AMX: registers of 16 rows of 64 bytes. One instruction multiplies a tile of 16
// x 32 bfloat16 numbers by one of 32 x 16 and adds the product to 16 x 16 float32 sums.
//
// A tile register has a name that the assembler must know, so the blocks below are written out by macros.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace din {
namespace DIN_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileElements = 16;  // of one row: floats, or pairs of bfloat16 numbers

inline int64_t WholeTiles(int64_t size) { return (size + kTileElements - 1) / kTileElements * kTileElements; }

// Has the compiler write what it holds back: GCC does not know what memory the instructions of tiles read.
inline void SettleMemory() { __asm__ volatile("" ::: "memory"); }

// The shapes of all eight tile registers, while it lives: 16 rows of 64 bytes each. A thread has its own registers.
// They are released at the end, so that the system need not save them and TensorFlow finds them as it left them.
class TileShapes {
 public:
  TileShapes() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof shapes == 64, "the processor reads 64 bytes");
    std::fill_n(shapes.row_bytes, 8, 64);
    std::fill_n(shapes.rows, 8, 16);
    SettleMemory();
    _tile_loadconfig(&shapes);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// Computes C [16 M, 16 N] = start + A [16 M, inner] B [inner, 16 N]. Sums are in the registers 0 to 3, rows of A in 4
// and 5, columns of B in 6 and 7. Steps are in elements; `inner` is in whole tiles.
template <int M, int N>
inline void TileBlock(const float* a, int64_t a_step, int64_t inner, const float* b, int64_t b_step, const float* start,
                      int64_t start_step, float* c, int64_t c_step) {
  const int64_t bytes = sizeof(float);
  SettleMemory();
  _tile_loadd(0, start, start_step * bytes);
  if constexpr (N > 1) _tile_loadd(1, start + 16, start_step * bytes);
  if constexpr (M > 1) _tile_loadd(2, start + 16 * start_step, start_step * bytes);
  if constexpr (M > 1 && N > 1) _tile_loadd(3, start + 16 * start_step + 16, start_step * bytes);
  for (int64_t k = 0; k < inner; k += kTileElements) {
    _tile_loadd(4, a + k, a_step * bytes);
    _tile_loadd(6, b + k * b_step, b_step * bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b + k * b_step + 16, b_step * bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + 16 * a_step + k, a_step * bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_step * bytes);
  if constexpr (N > 1) _tile_stored(1, c + 16, c_step * bytes);
  if constexpr (M > 1) _tile_stored(2, c + 16 * c_step, c_step * bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * c_step + 16, c_step * bytes);
}

// Computes the last rows of C, which are fewer than a tile has, in a block of their own, because the rows behind them
// may be another thread's.
template <int N>
void LastRows(const float* a, int64_t a_step, int64_t rows, int64_t inner, const float* b, int64_t b_step,
              const float* start, int64_t start_step, float* c, int64_t c_step) {
  alignas(64) float block[kTileRows * 16 * N] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(block + r * 16 * N, start + r * start_step, 64 * N);
  TileBlock<1, N>(a, a_step, inner, b, b_step, block, 16 * N, block, 16 * N);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_step, block + r * 16 * N, 64 * N);
}

// Computes N tiles of each row of C, whose columns of B stay in the cache.
template <int N>
void TileColumns(const float* a, int64_t a_step, int64_t rows, int64_t inner, const float* b, int64_t b_step,
                 const float* start, int64_t start_step, float* c, int64_t c_step) {
  int64_t r = 0;
  const auto run = [&](auto block) {
    block(a + r * a_step, a_step, inner, b, b_step, start + r * start_step, start_step, c + r * c_step, c_step);
  };
  for (; r + 2 * kTileRows <= rows; r += 2 * kTileRows) run(TileBlock<2, N>);
  for (; r + kTileRows <= rows; r += kTileRows) run(TileBlock<1, N>);
  if (r == rows) return;
  LastRows<N>(a + r * a_step, a_step, rows - r, inner, b, b_step, start + r * start_step, start_step, c + r * c_step,
              c_step);
}

// Computes C [rows, 16 x column tiles] = start + A B. A has rows up to a whole tile. `inner`, in elements, is in whole
// tiles. Steps between rows are in elements; that of `start` may be 0.
inline void MultiplyTiles(const float* a, int64_t a_step, int64_t rows, int64_t inner, const float* b, int64_t b_step,
                          int64_t column_tiles, const float* start, int64_t start_step, float* c, int64_t c_step) {
  for (; column_tiles >= 2; column_tiles -= 2, b += 32, start += 32, c += 32) {
    TileColumns<2>(a, a_step, rows, inner, b, b_step, start, start_step, c, c_step);
  }
  if (column_tiles) TileColumns<1>(a, a_step, rows, inner, b, b_step, start, start_step, c, c_step);
}

typedef float Row __attribute__((vector_size(64)));
typedef int32_t Lanes __attribute__((vector_size(64)));

// Swaps the upper right with the lower left of each 2 x 2 blocks of kStep x kStep elements.
template <int kStep>
inline void SwapBlocks(Row* rows) {
  Lanes upper, lower;  // lanes from 16 on are those of the lower row
  for (int i = 0; i < 16; ++i) {
    upper[i] = i & kStep ? 16 + i - kStep : i;
    lower[i] = i & kStep ? 16 + i : i + kStep;
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r & kStep) continue;
    const Row above = rows[r], below = rows[r + kStep];
    rows[r] = __builtin_shuffle(above, below, upper);
    rows[r + kStep] = __builtin_shuffle(above, below, lower);
  }
}

// Writes the transpose of 16 x 16 elements. `from` and `to` do not overlap.
inline void TransposeTile(const float* from, int64_t from_step, float* to, int64_t to_step) {
  Row rows[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) std::memcpy(&rows[r], from + r * from_step, sizeof(Row));
  SwapBlocks<8>(rows);
  SwapBlocks<4>(rows);
  SwapBlocks<2>(rows);
  SwapBlocks<1>(rows);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) std::memcpy(to + r * to_step, &rows[r], sizeof(Row));
}

}  // namespace
}  // namespace DIN_ISA
}  // namespace din
