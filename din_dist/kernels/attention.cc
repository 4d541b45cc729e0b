// Compiled once for each instruction set, DIN_ISA. DIN_LANES is the number of floats in a register. If DIN_BFLOAT16 is
// defined, the factors of matrix products are rounded to bfloat16; their sums and everything else stay float32. With
// DIN_TILES, these products are computed in AMX tiles.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if DIN_LANES == 16
#include <immintrin.h>
#endif
#ifdef DIN_TILES
#include "tiles.h"
#endif

namespace din {
namespace DIN_ISA {
namespace {

constexpr int64_t L = DIN_LANES;
static_assert(kLane % L == 0, "rows are padded to whole registers");

typedef float V __attribute__((vector_size(4 * DIN_LANES)));
typedef float Half __attribute__((vector_size(2 * DIN_LANES)));
typedef int32_t I __attribute__((vector_size(4 * DIN_LANES)));

template <typename T = V>
inline T Load(const float* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void Store(float* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

inline V All(float value) { return value - V{}; }

inline Half LowHalf(V value) {
  Half half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}

inline V Bits(I bits) { return (V)bits; }
inline I Bits(V value) { return (I)value; }

inline V Select(I mask, V yes, V no) { return Bits((Bits(yes) & mask) | (Bits(no) & ~mask)); }

// The smaller and the larger of two values. If one is NaN, the result is `x`.
#if DIN_LANES == 16  // one instruction; the compiler makes two of the other form
inline V Min(V most, V x) { return (V)_mm512_min_ps((__m512)most, (__m512)x); }
inline V Max(V least, V x) { return (V)_mm512_max_ps((__m512)least, (__m512)x); }
#else
inline V Min(V most, V x) { return most < x ? most : x; }
inline V Max(V least, V x) { return least > x ? least : x; }
#endif

// Returns 2^x to 2 units in the last place. x is clipped to [-126, 126]; NaN stays NaN.
inline V PowerOf2(V x) {
  x = Max(All(-126.0f), Min(All(126.0f), x));
  const V magic = All(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
  const V shifted = x + magic;
  const V r = x - (shifted - magic);
  // A polynomial of degree 5 for r in [-1/2, 1/2] that begins with 1, with the least relative error, 9.1e-8. It was
  // fitted by re-weighted least squares at Chebyshev nodes.
  V p = r * 1.326472731e-3f + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return Bits(Bits(p) + (Bits(shifted) << 23));
}

inline V Sigmoid(V x) {
  const V divisor = 1.0f + PowerOf2(x * -1.44269504088896341f);
#if DIN_LANES == 16  // a division takes as long as ten multiplications
  const V guess = (V)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)divisor);
  return guess * (2.0f - divisor * guess);
#else
  return 1.0f / divisor;
#endif
}

// --- Matrix products ---

// The inner dimension of a product is counted in elements. An element has the size of a float: it is one float, or two
// bfloat16 numbers whose products are added at once.
#ifdef DIN_BFLOAT16
constexpr int64_t kNumbers = 2;

inline V MultiplyAdd(V left, V right, V sum) {
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

inline Half MultiplyAdd(Half left, Half right, Half sum) {
  return (Half)_mm256_dpbf16_ps((__m256)sum, (__m256bh)left, (__m256bh)right);
}

// Converts the left factor: each two neighbours among `size` numbers become one element. `to` may be `from`.
const float* Along(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += 2 * L) {
    const V low = Load(from + i), high = i + L < size ? Load(from + i + L) : V{};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(to + i / 2, &both, sizeof both);
  }
  return to;
}

// Converts the right factor: each two neighbouring rows become one row of elements, [(rows + 1) / 2, width]. `to` may
// be `from`.
const float* Down(const float* from, int64_t rows, int64_t width, float* to) {
  alignas(64) static const int16_t kInTurn[2 * L] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_turn = _mm512_load_si512(kInTurn);
  for (int64_t r = 0; r < rows; r += 2, from += 2 * width) {
    for (int64_t i = 0; i < width; i += L) {
      const V low = Load(from + i), high = r + 1 < rows ? Load(from + width + i) : V{};
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      const __m512i pairs = _mm512_permutexvar_epi16(in_turn, (__m512i)both);
      std::memcpy(to + r / 2 * width + i, &pairs, sizeof pairs);
    }
  }
  return to;
}
#else
constexpr int64_t kNumbers = 1;

template <typename T>
inline T MultiplyAdd(T left, T right, T sum) {
  return sum + left * right;
}

inline const float* Along(const float* from, int64_t, float*) { return from; }
inline const float* Down(const float* from, int64_t, int64_t, float*) { return from; }
#endif

inline int64_t Elements(int64_t numbers) { return (numbers + kNumbers - 1) / kNumbers; }

#ifndef DIN_TILES
struct TileShapes {};
inline int64_t WholeTiles(int64_t size) { return size; }
#endif

// The right factor of the products of all tiles.
class Weights {
 public:
  Weights(const float* from, int64_t rows, int64_t width)
      : room_(kNumbers > 1 ? WholeTiles(Elements(rows)) * width : 0), elements_(Down(from, rows, width, room_.data())) {}
  operator const float*() const { return elements_; }

 private:
  std::vector<float> room_;
  const float* elements_;
};

// The array that a product is added to: rows of C itself, or one row for all rows.
struct Start {
  const float* rows;
  int64_t step;  // between two rows
};

#ifndef DIN_TILES
// Computes R rows of C [R, N registers] = start + A [R, inner] B [inner, N registers]; `inner` is at least 1. With
// `kHalf`, only the first half of the last register is computed; the other half is 0.
template <int R, int N, bool kHalf>
inline void Block(const float* a, int64_t row, int64_t step, int64_t inner, const float* b, int64_t ldb, Start start,
                  float* c, int64_t ldc) {
  constexpr int kWhole = kHalf ? N - 1 : N;
  V sums[R][N];
  Half halves[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kWhole; ++n) sums[r][n] = Load(start.rows + r * start.step + n * L);
    if constexpr (kHalf) halves[r] = Load<Half>(start.rows + r * start.step + kWhole * L);
  }
  int64_t k = 0;
  do {  // a do loop, so that the sums stay in registers
    V right[N];
    Half half;
#pragma GCC unroll 8
    for (int n = 0; n < kWhole; ++n) right[n] = Load(b + k * ldb + n * L);
    if constexpr (kHalf) half = Load<Half>(b + k * ldb + kWhole * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V left = All(a[r * row + k * step]);
#pragma GCC unroll 8
      for (int n = 0; n < kWhole; ++n) sums[r][n] = MultiplyAdd(left, right[n], sums[r][n]);
      if constexpr (kHalf) halves[r] = MultiplyAdd(LowHalf(left), half, halves[r]);
    }
  } while (++k < inner);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kWhole; ++n) Store(c + r * ldc + n * L, sums[r][n]);
    if constexpr (kHalf) {
      Store(c + r * ldc + kWhole * L, halves[r]);
      Store(c + r * ldc + kWhole * L + L / 2, Half{});
    }
  }
}

// Computes all rows: R at a time, and the rest together.
template <int R, int N, bool kHalf>
void Rows(const float* a, int64_t row, int64_t step, int64_t rows, int64_t inner, const float* b, int64_t ldb,
          Start start, float* c, int64_t ldc) {
  for (; rows >= R; rows -= R) {
    Block<R, N, kHalf>(a, row, step, inner, b, ldb, start, c, ldc);
    a += R * row;
    start.rows += R * start.step;
    c += R * ldc;
  }
  if constexpr (R > 1) {
    if (rows > 0) Rows<R - 1, N, kHalf>(a, row, step, rows, inner, b, ldb, start, c, ldc);
  }
}

#if DIN_LANES == 16  // these processors have 32 registers
constexpr int kMostRegisters = 5;
#else
constexpr int kMostRegisters = 2;
#endif

// Computes C [rows, Padded(columns)] = start + A B, where A's element (r, k) is a[r * row + k * step].
void Multiply(const float* a, int64_t row, int64_t step, int64_t rows, int64_t inner, const float* b, int64_t ldb,
              int64_t columns, Start start, float* c, int64_t ldc) {
  int64_t left = Padded(columns) / L;
  int64_t blocks = (left + kMostRegisters - 1) / kMostRegisters;
  const bool ends_in_half = left * L - columns >= L / 2;
  while (left > 0) {
    const int64_t width = (left + blocks - 1) / blocks;  // blocks of about equal width
    const auto run = [&](auto r, auto n) {
      if (ends_in_half && width == left) {
        Rows<r, n, true>(a, row, step, rows, inner, b, ldb, start, c, ldc);
      } else {
        Rows<r, n, false>(a, row, step, rows, inner, b, ldb, start, c, ldc);
      }
    };
    using std::integral_constant;
    switch (width) {
#if DIN_LANES == 16
      case 5:
        run(integral_constant<int, 5>(), integral_constant<int, 5>());
        break;
      case 4:
        run(integral_constant<int, 6>(), integral_constant<int, 4>());
        break;
      case 3:
        run(integral_constant<int, 8>(), integral_constant<int, 3>());
        break;
      case 2:
        run(integral_constant<int, 12>(), integral_constant<int, 2>());
        break;
      default:
        run(integral_constant<int, 12>(), integral_constant<int, 1>());
        break;
#else
      case 2:
        run(integral_constant<int, 6>(), integral_constant<int, 2>());
        break;
      default:
        run(integral_constant<int, 8>(), integral_constant<int, 1>());
        break;
#endif
    }
    b += width * L;
    start.rows += width * L;
    c += width * L;
    left -= width;
    --blocks;
  }
}

// Computes C [rows, Padded(columns)] = start + A [rows, Padded(inner)] B [inner, Padded(columns)]. `scratch` is as
// large as A, or A itself.
inline void MultiplyRows(const float* a, int64_t rows, int64_t inner, const Weights& b, int64_t columns, Start start,
                         float* c, float* scratch) {
  const int64_t width = Padded(inner), ld = Padded(columns);
  Multiply(Along(a, rows * width, scratch), width / kNumbers, 1, rows, Elements(inner), b, ld, columns, start, c, ld);
}

// Adds to C [inner, Padded(columns)] the transpose of A [rows, Padded(inner)] times B [rows, Padded(columns)]. Each
// scratch is as large as its factor, or the factor itself.
inline void AddTransposedByRows(const float* a, const float* b, int64_t rows, int64_t inner, int64_t columns, float* c,
                                float* scratch_of_a, float* scratch_of_b) {
  const int64_t width = Padded(inner), ld = Padded(columns);
  Multiply(Down(a, rows, width, scratch_of_a), 1, width, inner, Elements(rows), Down(b, rows, ld, scratch_of_b), ld,
           columns, {c, ld}, c, ld);
}
#else
// Computes C [rows, Padded(columns)] = start + A [rows, Padded(inner)] B [inner, Padded(columns)]. `scratch` has room
// for kTile rows of A, or is A itself.
inline void MultiplyRows(const float* a, int64_t rows, int64_t inner, const Weights& b, int64_t columns, Start start,
                         float* c, float* scratch) {
  const int64_t width = Padded(inner), ld = Padded(columns), step = WholeTiles(Elements(width));
  for (int64_t r = 0; r < rows; ++r) Along(a + r * width, width, scratch + r * step);
  MultiplyTiles(scratch, step, rows, step, b, ld, ld / L, start.rows, start.step, c, ld);
}

// Adds to C [inner, Padded(columns)] the transpose of A [rows, Padded(inner)] times B [rows, Padded(columns)], for at
// most kTile rows. The scratch of A has room for kTile of its rows, that of B for half as many; each may be its factor.
inline void AddTransposedByRows(const float* a, const float* b, int64_t rows, int64_t inner, int64_t columns, float* c,
                                float* scratch_of_a, float* scratch_of_b) {
  const int64_t width = Padded(inner), ld = Padded(columns), given = Elements(rows), whole = WholeTiles(given);
  const auto down = [&](const float* from, int64_t row, float* to) {
    Down(from, rows, row, to);
    std::fill_n(to + given * row, (whole - given) * row, 0.0f);
  };
  down(a, width, scratch_of_a);
  down(b, ld, scratch_of_b);
  float* transposed = scratch_of_a + kTile / 2 * width;
  for (int64_t k = 0; k < whole; k += L) {
    for (int64_t v = 0; v < width; v += L) {
      TransposeTile(scratch_of_a + k * width + v, width, transposed + v * whole + k, whole);
    }
  }
  MultiplyTiles(transposed, whole, inner, whole, scratch_of_b, ld, ld / L, c, ld, c, ld);
}
#endif

// --- Activations ---

struct Slopes {
  V of_input;         // with the standardised input constant
  V of_standardised;  // with the input constant
  V of_alpha;
};

template <Activation A>
inline V Value(V x, V n, V alpha, V beta) {
  if constexpr (A == kDice) return x * (alpha + Sigmoid(n) * (1.0f - alpha));
  if constexpr (A == kPRelu) return Select(x > V{}, x, alpha * x);
  if constexpr (A == kSigmoid) return Sigmoid(x);
  if constexpr (A == kScaled) return n * alpha + beta;
  return Select(x < V{}, V{}, x);
}

template <Activation A>
inline Slopes SlopesOf(V x, V n, V alpha) {
  if constexpr (A == kDice) {
    const V s = Sigmoid(n);
    return {alpha + s * (1.0f - alpha), x * (1.0f - alpha) * s * (1.0f - s), x * (1.0f - s)};
  }
  if constexpr (A == kPRelu) {
    const I up = x > V{}, down = x < V{};
    return {Select(up, All(1.0f), Select(down, alpha, V{})), V{}, Select(down, x, V{})};
  }
  if constexpr (A == kSigmoid) {
    const V s = Sigmoid(x);
    return {s * (1.0f - s), V{}, V{}};
  }
  if constexpr (A == kScaled) return {V{}, alpha, n};
  return {Select(x > V{}, All(1.0f), V{}), V{}, V{}};
}

template <Activation A>
inline V Beta(const Gate& gate, int64_t v) {
  if constexpr (A == kScaled) return Load(gate.beta + v);
  return V{};
}

// Prefetches a tile ahead, because the processor does not prefetch from pages that it has not read yet.
inline void FetchNextTile(const float* row, int64_t width) { __builtin_prefetch(row + kTile * width); }

// Works row by row, because rows come from memory in order, while arrays of columns stay in the cache.
template <Activation A>
void ActivateAs(const Gate& gate, const float* x, int64_t rows, float* y) {
  const int64_t width = Padded(gate.width);
  for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
    for (int64_t v = 0; v < width; v += L) {
      FetchNextTile(x + v, width);
      const V value = Load(x + v);
      const V n = (value - Load(gate.mean + v)) * Load(gate.scale + v);
      Store(y + v, Value<A>(value, n, Load(gate.alpha + v), Beta<A>(gate, v)));
    }
  }
}

inline void AddTo(float* sum, V value) { Store(sum, Load(sum) + value); }

// Computes the outputs `y` and replaces their gradient by the gradient with respect to x, statistics constant. Adds to
// `sums` [3, width] the gradient with respect to the standardised input, the same times that input, and the gradient of
// alpha; for kScaled [4, width], also that of beta.
template <Activation A>
void ActivateAndDifferentiateAs(const Gate& gate, const float* x, int64_t rows, float* gradient, float* y,
                                float* sums) {
  const int64_t width = Padded(gate.width);
  for (int64_t r = 0; r < rows; ++r, x += width, gradient += width, y += width) {
    for (int64_t v = 0; v < width; v += L) {
      FetchNextTile(x + v, width);
      const V value = Load(x + v), up = Load(gradient + v), scale = Load(gate.scale + v), alpha = Load(gate.alpha + v);
      const V n = (value - Load(gate.mean + v)) * scale;
      Store(y + v, Value<A>(value, n, alpha, Beta<A>(gate, v)));
      const Slopes slopes = SlopesOf<A>(value, n, alpha);
      const V of_n = up * slopes.of_standardised;
      Store(gradient + v, up * slopes.of_input + scale * of_n);
      AddTo(sums + v, of_n);
      AddTo(sums + width + v, of_n * n);
      AddTo(sums + 2 * width + v, up * slopes.of_alpha);
      if constexpr (A == kScaled) AddTo(sums + 3 * width + v, up);
    }
  }
}

#define DIN_BY_ACTIVATION(function, gate, ...)                        \
  switch ((gate).activation) {                                        \
    case kDice:                                                       \
      return function<kDice>(gate, __VA_ARGS__);                      \
    case kPRelu:                                                      \
      return function<kPRelu>(gate, __VA_ARGS__);                     \
    case kSigmoid:                                                    \
      return function<kSigmoid>(gate, __VA_ARGS__);                   \
    case kRelu:                                                       \
      return function<kRelu>(gate, __VA_ARGS__);                      \
    case kScaled:                                                     \
      return function<kScaled>(gate, __VA_ARGS__);                    \
  }

void Activate(const Gate& gate, const float* x, int64_t rows, float* y) {
  DIN_BY_ACTIVATION(ActivateAs, gate, x, rows, y)
}

void ActivateAndDifferentiate(const Gate& gate, const float* x, int64_t rows, float* gradient, float* y, float* sums) {
  DIN_BY_ACTIVATION(ActivateAndDifferentiateAs, gate, x, rows, gradient, y, sums)
}

// Computes the gradient with respect to x from `held`, the gradient with the statistics constant.
void Differentiate(const Statistics& statistics, const float* x, const float* held, int64_t rows, float* of_x) {
  const int64_t width = Padded(statistics.width);
  for (int64_t r = 0; r < rows; ++r, x += width, held += width, of_x += width) {
    for (int64_t v = 0; v < width; v += L) {
      FetchNextTile(x + v, width);
      FetchNextTile(held + v, width);
      const V scale = Load(statistics.scale + v);
      const V n = (Load(x + v) - Load(statistics.mean + v)) * scale;
      const V by_statistics = Load(statistics.mean_of_gradient + v) + n * Load(statistics.mean_of_product + v);
      Store(of_x + v, Load(held + v) - scale * by_statistics);
    }
  }
}

// --- Rows ---

// Moves the sums of a tile, in float32, to the sums over all tiles, in float64.
void Gather(float* tile, int64_t size, double* sums) {
  for (int64_t i = 0; i < size; ++i) sums[i] += tile[i];
  std::fill_n(tile, size, 0.0f);
}

// Adds x - centre and its square to `sums` [2, width].
void SumAbout(const float* x, const float* centre, int64_t rows, int64_t width, double* sums) {
  for (int64_t v = 0; v < width; v += L) {
    const V c = Load(centre + v);
    V total{}, squares{};
    for (int64_t r = 0; r < rows; ++r) {
      const V shifted = Load(x + r * width + v) - c;
      total += shifted;
      squares += shifted * shifted;
    }
    for (int64_t i = 0; i < L; ++i) {
      sums[v + i] += total[i];
      sums[width + v + i] += squares[i];
    }
  }
}

void SumDown(const float* x, int64_t rows, int64_t width, double* sums) {
  for (int64_t v = 0; v < width; v += L) {
    V total{};
    for (int64_t r = 0; r < rows; ++r) total += Load(x + r * width + v);
    for (int64_t i = 0; i < L; ++i) sums[v + i] += total[i];
  }
}

inline void Times(const float* __restrict a, const float* __restrict b, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] = a[i] * b[i];
}

inline void MultiplyBy(const float* __restrict a, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] *= a[i];
}

inline void AddTimes(const float* __restrict a, const float* __restrict b, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] += a[i] * b[i];
}

inline void AddTimesAndScaled(const float* __restrict a, const float* __restrict b, float scale,
                              const float* __restrict c, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] += a[i] * b[i] + scale * c[i];
}

inline void AddScaled(float scale, const float* __restrict a, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] += scale * a[i];
}

inline void Add(const float* __restrict a, int64_t width, float* __restrict to) {
  for (int64_t i = 0; i < width; ++i) to[i] += a[i];
}

inline float Dot(const float* a, const float* b, int64_t width) {
  V sums{};
  int64_t i = 0;
  for (; i + L <= width; i += L) sums += Load(a + i) * Load(b + i);
  float total = 0;
  for (int64_t lane = 0; lane < L; ++lane) total += sums[lane];
  for (; i < width; ++i) total += a[i] * b[i];
  return total;
}

// Keys are read in an order that a processor cannot predict, so they are prefetched.
constexpr int64_t kAhead = 10;  // pairs

// Prefetches the row of `rows` [K, width] that belongs to the key of the pair kAhead after `pair`.
inline void FetchKey(const Pairs& pairs, int64_t pair, const float* rows, int64_t width) {
  if (pair + kAhead >= pairs.count) return;
  const float* row = rows + pairs.key_of[pair + kAhead] * width;
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

// Computes q * k of the pairs [begin, begin + rows): [rows, Padded(H)].
void Products(const Pairs& pairs, const float* candidate, const float* keys, int64_t width, int64_t begin,
              int64_t rows, float* to) {
  const int64_t padded = Padded(width);
  for (int64_t r = 0; r < rows; ++r, to += padded) {
    const int64_t q = pairs.candidate_of[begin + r], k = pairs.key_of[begin + r];
    FetchKey(pairs, begin + r, keys, width);
    Times(candidate + q * width, keys + k * width, width, to);
    std::memset(to + width, 0, (padded - width) * sizeof(float));
  }
}

// Copies [rows, from_width] to [rows, to_width]; columns beyond `from_width` are 0.
void CopyRows(const float* from, int64_t from_width, int64_t rows, float* to, int64_t to_width) {
  const int64_t width = std::min(from_width, to_width);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * to_width, from + r * from_width, width * sizeof(float));
    std::fill(to + r * to_width + width, to + (r + 1) * to_width, 0.0f);
  }
}

// Returns the rows [begin, begin + rows) of a dense array with padding, copied to `scratch` if they need any.
const float* PaddedRows(const float* from, int64_t begin, int64_t rows, int64_t width, float* scratch) {
  from += begin * width;
  if (width == Padded(width)) return from;
  CopyRows(from, width, rows, scratch, Padded(width));
  return scratch;
}

const float* Zeros(float* to, int64_t size) {
  std::fill_n(to, size, 0.0f);
  return to;
}

// --- Passes ---

void RunProject(const Projection& pass, int64_t begin, int64_t end, float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t units = Padded(pass.units);
  const Weights kernel(pass.kernel, pass.width, units);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    const float* from = PaddedRows(pass.from, tile, rows, pass.width, scratch);
    MultiplyRows(from, rows, pass.width, kernel, pass.units, {pass.bias, 0}, pass.to + tile * units, scratch);
  }
}

void RunProjectGradient(const ProjectionGradient& pass, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                        float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t units = Padded(pass.units), width = Padded(pass.width);
  float* of_from = scratch + kTile * width;
  float* down = of_from + kTile * width;
  float* along = down + kTile * units / kNumbers;
  const float* zeros = Zeros(along + kTile * units, width);
  const Weights transposed_kernel(pass.transposed_kernel, pass.units, width);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    const float* of_to = pass.of_to + tile * units;
    SumDown(of_to, rows, units, of_bias);
    const float* from = PaddedRows(pass.from, tile, rows, pass.width, scratch);
    AddTransposedByRows(from, of_to, rows, pass.width, pass.units, of_kernel, scratch, down);
    float* to = pass.of_from + tile * pass.width;
    if (width == pass.width) {
      MultiplyRows(of_to, rows, pass.units, transposed_kernel, pass.width, {to, width}, to, along);
      continue;
    }
    MultiplyRows(of_to, rows, pass.units, transposed_kernel, pass.width, {zeros, 0}, of_from, along);
    for (int64_t r = 0; r < rows; ++r) Add(of_from + r * width, pass.width, to + r * pass.width);
  }
}

void RunFirst(const First& pass, int64_t begin, int64_t end, double* sums, float* products) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t units = Padded(pass.units);
  const Weights kernel(pass.kernel, pass.width, units);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    Products(pass.pairs, pass.candidate, pass.keys, pass.width, tile, rows, products);
    float* x = pass.x + tile * units;
    for (int64_t r = 0; r < rows; ++r) {
      const float* a = pass.by_candidate + pass.pairs.candidate_of[tile + r] * units;
      const float* b = pass.by_key + pass.pairs.key_of[tile + r] * units;
      FetchKey(pass.pairs, tile + r, pass.by_key, units);
      float* to = x + r * units;
      for (int64_t i = 0; i < units; i += L) Store(to + i, Load(a + i) + Load(b + i));
      if (pass.pairs.side_of) Add(pass.by_side + pass.pairs.side_of[tile + r] * units, units, to);
    }
    MultiplyRows(products, rows, pass.width, kernel, pass.units, {x, units}, x, products);
    SumAbout(x, pass.centre, rows, units, sums);
  }
}

void RunFirstGradient(const FirstGradient& pass, int64_t begin, int64_t end, const FirstGradientSums& sums,
                      float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t interest_width = pass.width + pass.side_width;
  const int64_t units = Padded(pass.statistics.width), width = Padded(pass.width);
  float* products = scratch;
  float* of_x = products + kTile * width;
  float* of_products = of_x + kTile * units;
  float* down = of_products + kTile * width;
  float* along = down + kTile * units / kNumbers;
  const float* zeros = Zeros(along + kTile * units, width);
  const Weights transposed_kernel(pass.transposed_kernel, pass.statistics.width, width);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    Differentiate(pass.statistics, pass.x + tile * units, pass.held + tile * units, rows, of_x);
    Products(pass.pairs, pass.candidate, pass.keys, pass.width, tile, rows, products);
    AddTransposedByRows(products, of_x, rows, pass.width, pass.statistics.width, sums.of_kernel, products, down);
    MultiplyRows(of_x, rows, pass.statistics.width, transposed_kernel, pass.width, {zeros, 0}, of_products, along);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t q = pass.pairs.candidate_of[tile + r], k = pass.pairs.key_of[tile + r];
      FetchKey(pass.pairs, tile + r, sums.of_keys, pass.width);
      FetchKey(pass.pairs, tile + r, sums.of_by_key, units);
      AddTimes(of_products + r * width, pass.keys + k * pass.width, pass.width, pass.of_candidate + q * pass.width);
      AddTimesAndScaled(of_products + r * width, pass.candidate + q * pass.width, pass.weights[tile + r],
                        pass.of_interest + q * interest_width, pass.width, sums.of_keys + k * pass.width);
      Add(of_x + r * units, units, pass.of_by_candidate + q * units);
      Add(of_x + r * units, units, sums.of_by_key + k * units);
      if (!pass.pairs.side_of) continue;
      const int64_t s = pass.pairs.side_of[tile + r];
      AddScaled(pass.weights[tile + r], pass.of_interest + q * interest_width + pass.width, pass.side_width,
                sums.of_sides + s * pass.side_width);
      Add(of_x + r * units, units, sums.of_by_side + s * units);
    }
  }
}

void RunDense(const Dense& pass, int64_t begin, int64_t end, double* sums, float* activated) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t units = Padded(pass.units), width = Padded(pass.gate.width);
  const Weights kernel(pass.kernel, pass.gate.width, units);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    Activate(pass.gate, pass.x + tile * width, rows, activated);
    if (pass.factors) MultiplyBy(pass.factors + tile * width, rows * width, activated);
    float* next = pass.next + tile * units;
    MultiplyRows(activated, rows, pass.gate.width, kernel, pass.units, {pass.bias, 0}, next, activated);
    SumAbout(next, pass.centre, rows, units, sums);
  }
}

void RunDenseGradient(const DenseGradient& pass, int64_t begin, int64_t end, float* of_kernel, double* of_bias,
                      double* sums, float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  const int64_t units = Padded(pass.statistics.width), width = Padded(pass.gate.width);
  float* activated = scratch;
  float* of_next = activated + kTile * width;
  float* down = of_next + kTile * units;
  float* along = down + kTile * units / kNumbers;
  float* tile_sums = along + kTile * units;
  std::fill_n(tile_sums, 4 * width, 0.0f);
  const float* zeros = Zeros(tile_sums + 4 * width, width);
  const Weights transposed_kernel(pass.transposed_kernel, pass.statistics.width, width);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    Differentiate(pass.statistics, pass.next + tile * units, pass.held_of_next + tile * units, rows, of_next);
    SumDown(of_next, rows, units, of_bias);
    float* gradient = pass.held + tile * width;
    MultiplyRows(of_next, rows, pass.statistics.width, transposed_kernel, pass.gate.width, {zeros, 0}, gradient, along);
    const float* factors = pass.factors ? pass.factors + tile * width : nullptr;
    if (factors) MultiplyBy(factors, rows * width, gradient);
    ActivateAndDifferentiate(pass.gate, pass.x + tile * width, rows, gradient, activated, tile_sums);
    if (factors) MultiplyBy(factors, rows * width, activated);
    Gather(tile_sums, 4 * width, sums);
    AddTransposedByRows(activated, of_next, rows, pass.gate.width, pass.statistics.width, of_kernel, activated, down);
  }
}

// Returns the end of the pairs in [begin, end) that have the same candidate as pair `begin`.
int64_t EndOfCandidate(const Pairs& pairs, int64_t begin, int64_t end) {
  int64_t pair = begin + 1;
  while (pair < end && pairs.candidate_of[pair] == pairs.candidate_of[begin]) ++pair;
  return pair;
}

void RunPool(const Pool& pass, int64_t begin, int64_t end, float* activated) {
  const int64_t inner = Padded(pass.gate.width);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    Activate(pass.gate, pass.x + tile * inner, rows, activated);
    for (int64_t r = 0; r < rows; ++r) {
      pass.weights[tile + r] = (Dot(activated + r * inner, pass.output, inner) + pass.bias) / pass.divisor;
    }
  }
  for (int64_t first = begin; first < end;) {
    const int64_t last = EndOfCandidate(pass.pairs, first, end);
    if (pass.softmax) {
      const float largest = *std::max_element(pass.weights + first, pass.weights + last);
      float total = 0;
      for (int64_t p = first; p < last; ++p) total += pass.weights[p] = std::exp(pass.weights[p] - largest);
      for (int64_t p = first; p < last; ++p) pass.weights[p] /= total;
    }
    float* interest = pass.interest + pass.pairs.candidate_of[first] * (pass.width + pass.side_width);
    for (int64_t p = first; p < last; ++p) {
      FetchKey(pass.pairs, p, pass.keys, pass.width);
      AddScaled(pass.weights[p], pass.keys + pass.pairs.key_of[p] * pass.width, pass.width, interest);
      if (!pass.pairs.side_of) continue;
      const float* side = pass.sides + pass.pairs.side_of[p] * pass.side_width;
      AddScaled(pass.weights[p], side, pass.side_width, interest + pass.width);
    }
    first = last;
  }
}

void RunPoolGradient(const PoolGradient& pass, int64_t begin, int64_t end, double* of_output, double* sums,
                     float* scratch) {
  for (int64_t first = begin; first < end;) {
    const int64_t last = EndOfCandidate(pass.pairs, first, end);
    const float* of_interest = pass.of_interest + pass.pairs.candidate_of[first] * (pass.width + pass.side_width);
    float mean = 0;
    for (int64_t p = first; p < last; ++p) {
      FetchKey(pass.pairs, p, pass.keys, pass.width);
      pass.of_scores[p] = Dot(of_interest, pass.keys + pass.pairs.key_of[p] * pass.width, pass.width);
      if (pass.pairs.side_of) {
        const float* side = pass.sides + pass.pairs.side_of[p] * pass.side_width;
        pass.of_scores[p] += Dot(of_interest + pass.width, side, pass.side_width);
      }
      mean += pass.weights[p] * pass.of_scores[p];
    }
    for (int64_t p = first; p < last; ++p) {
      if (pass.softmax) pass.of_scores[p] = pass.weights[p] * (pass.of_scores[p] - mean);
      pass.of_scores[p] /= pass.divisor;
    }
    first = last;
  }
  const int64_t inner = Padded(pass.gate.width);
  float* activated = scratch;
  float* tile_sums = activated + kTile * inner;
  std::fill_n(tile_sums, 3 * inner, 0.0f);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    float* gradient = pass.held + tile * inner;
    for (int64_t r = 0; r < rows; ++r) {
      const V of_score = All(pass.of_scores[tile + r]);
      for (int64_t v = 0; v < inner; v += L) Store(gradient + r * inner + v, of_score * Load(pass.output + v));
    }
    ActivateAndDifferentiate(pass.gate, pass.x + tile * inner, rows, gradient, activated, tile_sums);
    Gather(tile_sums, 3 * inner, sums);
    for (int64_t v = 0; v < inner; v += L) {
      V total{};
      for (int64_t r = 0; r < rows; ++r) total += pass.of_scores[tile + r] * Load(activated + r * inner + v);
      for (int64_t i = 0; i < L; ++i) of_output[v + i] += total[i];
    }
    for (int64_t r = 0; r < rows; ++r) of_output[inner] += pass.of_scores[tile + r];
  }
}

void RunSumsAbout(const Normalised& pass, int64_t begin, int64_t end, double* sums, float* scratch) {
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    SumAbout(PaddedRows(pass.x, tile, rows, pass.width, scratch), pass.centre, rows, Padded(pass.width), sums);
  }
}

void RunNormalisedGradient(const NormalisedGradient& pass, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = pass.statistics.width, padded = Padded(width);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = std::min(kTile, end - tile);
    const float* x = PaddedRows(pass.x, tile, rows, width, scratch);
    const float* held = PaddedRows(pass.held, tile, rows, width, scratch + kTile * padded);
    float* to = pass.of_x + tile * width;
    float* of_x = width == padded ? to : scratch + 2 * kTile * padded;
    Differentiate(pass.statistics, x, held, rows, of_x);
    if (of_x != to) CopyRows(of_x, padded, rows, to, width);
  }
}

}  // namespace

extern const Passes kPasses{RunProject,       RunProjectGradient, RunFirst,        RunFirstGradient, RunDense,
                            RunDenseGradient, RunPool,            RunPoolGradient, RunSumsAbout,     RunNormalisedGradient};

}  // namespace DIN_ISA
}  // namespace din
